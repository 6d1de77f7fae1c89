"""Recipes that are broken, each in one way."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel

from megatron_reheat.config import Config
from scripts.faults.case import Bench, Case, override, text

RECIPE = ("recipe.yaml",)
LONG = "n" * 300
NUL = "a\0b"


def broken_configs() -> list[Case]:
    return [
        *_syntax(),
        *_not_yaml_errors(),
        *_doubles(),
        *_sizes(),
        *_keys(),
        *_fields(),
        *_together(),
        *_recipe_files(),
        *_data(),
        *_model_paths(),
        *_run_folders(),
        *_rights(),
        *_options(),
    ]


# -- text ------------------------------------------------------------------------------------------------------------


def _syntax() -> Iterator[Case]:
    kind = "YAML syntax"
    for name, content in {
        "open bracket": "{good}\nrl: [1, 2\n",
        "open brace": "{good}\nrl: {group_size: 4\n",
        "open quote": "{good}\nrl:\n  aggregation: 'token_mean\n",
        "open double quote": '{good}\nrl:\n  aggregation: "token_mean\n',
        "tab as indentation": "{good}\nrl:\n\tgroup_size: 4\n",
        "indented too little": "{good}\nrl:\n   group_size: 4\n  clip_low: 0.2\n",
        "colon in a value": "{good}\nlogging: {wandb_project: a: b}\n",
        "colon in a block value": "{good}\nlogging:\n  wandb_project: a: b\n",
        "percent sign": "%good\n{good}",
        "at sign": "{good}\nlogging:\n  wandb_project: @me\n",
        "backtick": "{good}\nlogging:\n  wandb_project: `date`\n",
        "star without anchor": "{good}\nlogging:\n  wandb_project: *star\n",
        "stray closing bracket": "{good}\nrl: ]\n",
        "list and mapping": "{good}\nrl:\n  - 4\n  group_size: 4\n",
        "two documents": "{good}\n---\nrl: {group_size: 4}\n",
        "bad escape": '{good}\nlogging:\n  wandb_project: "\\q"\n',
        "block text with a bad header": "{good}\nlogging:\n  wandb_project: |9x\n    a\n",
        "no space behind the colon": "{good}\nrl:\n  group_size:4\n  clip_low: 0.2\n",
        "a merge conflict": "<<<<<<< HEAD\n{good}=======\nrl: {}\n>>>>>>> other\n",
        "only a word": "banana\n",
        "only a number": "17\n",
        "only a list": "- model\n- data\n",
        "nothing": "",
        "only a comment": "# soon\n",
        "JSON cut short": '{"model": {"hf_path": "m"}, "data": {',
        "TOML": '[model]\nhf_path = "m"\n',
        "INI": "[model]\nhf_path=m\n",
        "control character": "{good}\nlogging:\n  wandb_project: a\x07b\n",
        "NUL": "{good}\nlogging:\n  wandb_project: a\0b\n",
        "only NULs": "\0" * 4096,
        "a key of two words with a question mark": "{good}\n? [a, b]\n: c\n",
        "a mapping as a key": "{good}\n? {a: b}\n: c\n",
        "a bad merge": "{good}\nrl:\n  <<: 3\n",
        "a merge of a list of words": "{good}\nrl:\n  <<: [a, b]\n",
    }.items():
        yield text(kind, name, content, (*RECIPE, "model", "recipe"))
    for name, raw in {
        "UTF-16": "model: {}\n".encode("utf-16"),
        "Latin-1": b"# na\xefve\nmodel: {}\n",
        "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xcb",
        "pickle": b"\x80\x04cos\nsystem\n(S'x'\ntR.",
        "PNG": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        "half a character": b"run: {name: \xc3}\n",
    }.items():
        yield text("not a text file", name, raw)


def _not_yaml_errors() -> Iterator[Case]:
    kind = "errors that are not YAML's"
    digits, hexadecimal = "9" * 5000, "0x" + "f" * 5000
    for name, value in {
        "number of 5,000 digits": digits,
        "hexadecimal of 5,000 digits": hexadecimal,
        "octal of 5,000 digits": "0o" + "7" * 5000,
        "binary of 20,000 digits": "0b" + "1" * 20000,
        "exponent of 5,000": "1e5000",
        "minus 5,000 digits": "-" + digits,
    }.items():
        yield override(kind, f"rl.group_size={value}", words=("rl.group_size",))
        yield override(kind, f"optimizer.lr={value}", words=("optimizer.lr",))
        yield text(kind, f"{name} in a file", f"{{good}}\nrl:\n  group_size: {value}\n", ("rl.group_size",))
        yield override(kind, f"data.options={{a: {value}}}", words=("data.options",))
    for tag, value in {
        "!!int": "abc",
        "!!float": "abc",
        "!!bool": "x",
        "!!binary": "'é'",
        "!!timestamp": "2024-02-30",
        "!!set": "[1]",
        "!!omap": "[1]",
        "!!pairs": "[1]",
        "!!python/object/apply:os.system": "['touch {canary}']",
        "!!python/name:os.system": "''",
        "!include": "/etc/passwd",
        "!ENV": "${HOME}",
    }.items():
        content = f"{{good}}\nrl:\n  group_size: {tag} {value}\n"
        yield text(kind, f"{tag} {value}"[:60], content, (*RECIPE, "rl.group_size"))
        yield text(
            kind, f"passed on: {tag} {value}"[:60], _data_options(f"{{a: {tag} {value}}}"), (*RECIPE, "data.options")
        )
    for name, value in {"unhashable key": "{[1]: 2}", "mapping as key": "{{a: 1}: 2}"}.items():
        yield text(kind, f"passed on: {name}", _data_options(value), (*RECIPE, "data.options"))


def _data_options(value: str) -> str:
    return f"data: {{path: p.jsonl, options: {value}}}\nmodel: {{hf_path: m}}\n"


def _doubles() -> Iterator[Case]:
    kind = "a key twice"
    for name, content, key in (
        ("section", "{good}\nrl: {group_size: 4}\nrl: {clip_low: 0.1}\n", "rl"),
        ("section of the good recipe", "{good}\nmodel: {dtype: bfloat16}\n", "model"),
        ("key in a block", "{good}\nrl:\n  group_size: 4\n  group_size: 8\n", "rl.group_size"),
        ("key in braces", "{good}\nrl: {group_size: 4, group_size: 8}\n", "rl.group_size"),
        ("key in quotes", "{good}\nrl: {group_size: 4, 'group_size': 8}\n", "rl.group_size"),
        ("key of eval.data", "eval: {data: {path: a, path: b}}\n", "eval.data.path"),
        ("key of options", _data_options("{a: 1, a: 2}"), "data.options.a"),
        ("key of options' mapping", _data_options("{a: {b: 1, b: 2}}"), "data.options.a.b"),
        ("key of a list in options", _data_options("{a: [{b: 1, b: 2}]}"), "data.options.a.0.b"),
        ("base", "base: a.yaml\nbase: b.yaml\n", "base"),
    ):
        yield text(kind, name, content, (key,))
    yield override(kind, "rl={group_size: 4, group_size: 8}", words=("rl.group_size", "rl:", "override rl"))
    yield override(kind, "data.options={a: 1, a: 2}", words=("data.options",))


def _sizes() -> Iterator[Case]:
    kind = "bombs"
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    yield text(kind, "aliases, unknown keys", bomb + "{good}", ("a0", *RECIPE))
    yield text(kind, "aliases passed on", _bomb_in("data:\n  path: p\n  options:\n", "    ") + "model: {hf_path: m}\n")
    yield text(kind, "aliases in a section", _bomb_in("model: {hf_path: m}\ndata: {path: p}\nrl:\n", "  "))
    yield text(
        kind, "aliases as rollout.servers", bomb + "rollout: {servers: *a9}\nmodel: {hf_path: m}\ndata: {path: p}\n"
    )
    yield text(kind, "aliases of mappings", _mapping_bomb())
    yield text(kind, "a list in itself", "{good}\nrl: &a [*a]\n", ("rl", *RECIPE))
    yield text(kind, "options in themselves", "data: {path: p, options: &a {b: *a}}\nmodel: {hf_path: m}\n")
    yield text(kind, "a merge of itself", "{good}\nrl: &a\n  <<: *a\n  group_size: 4\n", ("rl", *RECIPE))
    for name, content in {
        "brackets": "rl: " + "[" * 50_000,
        "closed brackets": "rl: " + "[" * 3_000 + "]" * 3_000 + "\n",
        "braces": "rl: " + "{a: " * 20_000,
        "blocks": "".join(" " * i + "a:\n" for i in range(1500)),
        "dashes": "- " * 5_000 + "\n",
    }.items():
        yield text("nested deeply", name, content, (*RECIPE, "rl"))
        yield text(
            "nested deeply", f"passed on: {name}", f"data:\n  path: p\n  options:\n    {content.strip()}\n", RECIPE
        )
    yield override("nested deeply", "rl=" + "[" * 50_000, words=("rl",))
    yield override("nested deeply", "data.options=" + "[" * 50_000, words=("data.options",))
    yield override("nested deeply", "data.options=" + "{a: " * 900 + "1" + "}" * 900, words=("data.options",))
    yield override("nested deeply", ".".join(["a"] * 5000) + "=1", words=("a.a",))
    yield text(kind, "a long key", "{good}\n" + "k" * 100_000 + ": 1\n", ("kkk", *RECIPE))
    yield text(kind, "a long value", "{good}\nrl:\n  group_size: " + "k" * 1_000_000 + "\n", ("rl.group_size",))
    yield text(kind, "many unknown keys", "{good}\n" + "".join(f"key{i}: 1\n" for i in range(5000)), ("key0",))
    yield text(kind, "a large file", b"# comment\n" * 20_000_000, RECIPE)


def _bomb_in(start: str, indent: str) -> str:
    first = f"{indent}a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    return start + first + "".join(f"{indent}a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


def _mapping_bomb() -> str:
    lines = ["data:\n  path: p\n  options:\n    m0: &m0 {a: x, b: x, c: x, d: x}\n"]
    lines += [f"    m{i}: &m{i} {{{', '.join(f'{key}: *m{i - 1}' for key in 'abcdefgh')}}}\n" for i in range(1, 10)]
    return "".join(lines) + "model: {hf_path: m}\n"


# -- keys and values -------------------------------------------------------------------------------------------------


def _keys() -> Iterator[Case]:
    kind = "unknown keys"
    for section in Config.model_fields:
        yield override(kind, f"{section}.zzz=1", words=(f"{section}.zzz",))
        yield override(kind, f"{section}s={{}}", words=(f"{section}s",))
    for key in ("group_size", "hf_path", "lr", "temperature", "steps"):
        yield override(kind, f"{key}=1", words=(key,))
    yield override(kind, "eval.data.zzz=1", words=("eval.data.zzz",))
    for wrong in (
        "rl.group_size",
        "=3",
        "rl..group_size=3",
        ".=1",
        "rl.=1",
        " =1",
        "rl.group_size==3",
        "rl:group_size=3",
    ):
        yield override("not key=value", wrong, words=(wrong.partition("=")[0], "override", "unknown key"))
    yield override("not key=value", "rl.group_size.more=3", words=("rl.group_size",))
    yield override("not key=value", f"{NUL.replace(chr(0), chr(1))}=3", words=("override", "unknown key"))
    for section in Config.model_fields:
        yield text("not a section", f"{section}: 3", f"{{good}}\n{section}: 3\n", (section,))
    yield text("not a section", "model: null", "model: null\ndata: {path: p}\n", ("model",))
    yield text("not a section", "no model", "data: {path: p}\n", ("model",))
    yield text("not a section", "no data", "model: {hf_path: m}\n", ("data",))


def _fields() -> Iterator[Case]:
    """Every field with what is not of its type, and every number with one that is too large or below its range."""
    for key, annotation in _leaves(Config, ""):
        kinds = {typing.get_origin(member) or member for member in _members(annotation)}
        numbers = kinds & {int, float}
        if numbers or bool in kinds or Literal in kinds:
            yield override("wrong type", f"{key}=banana", words=(key,))
        if numbers:
            huge = "1" + "0" * 30 if int in kinds else "1e300"
            yield override("too large", f"{key}={huge}", words=_related(key))
            yield override("below range", f"{key}=-{huge}", words=_related(key))
            yield override("not finite", f"{key}={'nan' if len(key) % 2 else '-inf'}", words=(key,))
        if str in kinds and not numbers:
            yield text("wrong type", f"{key}: a mapping", _nested(key, "\n{indent}a: [1]\n{indent}b: 2"), (key,))
    for key, value in {
        "rl.group_size": "2.5",
        "rl.clip_low": "1.0",
        "rl.dual_clip": "1.0",
        "rl.tis_cap": "0.5",
        "optimizer.beta1": "1.0",
        "optimizer.beta2": "1.5",
        "rollout.temperature": "0",
        "controller.rollout_temperature": "0",
        "eval.top_p": "0",
        "reheat.teacher_temperature": "1.0",
        "rollout.gpu_memory_utilization": "0",
        "checkpoint.keep": "0",
        "model.dtype": "fp16",
        "run.seed": "1.5",
        "rollout.servers": "[gpu-7]",
        "checkpoint.keep_best": "loss",
        "rl.normalize_by_std": "maybe",
        "data.template": "jinja",
        "data.source": "csv",
        "eval.temperature": "-1",
        "rollout.max_tokens": "1_0.5",
        "optimizer.lr": "2e-6x",
        "parallel.tensor": "two",
        "rl.minibatch_prompts": "0",
    }.items():
        yield override("out of range", f"{key}={value}", words=(key, key.replace(".", ": ", 1)))
    for server in (
        "gpu-7:8300",
        "ftp://a",
        "http://",
        "http://a:99999",
        "http://a:b",
        "http://[::1",
        "http://a b",
        "http://a\\n",
    ):
        yield override(
            "out of range", f"rollout.servers=['{server}']", "rollout.mode=server", words=("rollout.servers",)
        )


def _related(key: str) -> tuple[str, ...]:
    """Some limits are those of several keys together, whose sentence may name another of them."""
    longest = ("the longest response",) if key.endswith("max_tokens") else ()
    return (key, key.rpartition(".")[2], *longest)


def _leaves(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, info in section.model_fields.items():
        inner = [m for m in _members(info.annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
        if inner:
            yield from _leaves(inner[0], f"{prefix}{name}.")
        elif not any((typing.get_origin(m) or m) is dict for m in _members(info.annotation)):
            yield prefix + name, info.annotation


def _members(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _nested(key: str, value: str) -> str:
    """A recipe with one key, whose value may go on over lines."""
    *parents, leaf = key.split(".")
    lines = [f"{'  ' * depth}{parent}:" for depth, parent in enumerate(parents)]
    others = {"model": "model: {hf_path: m}", "data": "data: {path: p}"}
    rest = [line for section, line in others.items() if section != parents[0]]
    last = f"{'  ' * len(parents)}{leaf}:{value.format(indent='  ' * (len(parents) + 1))}"
    return "\n".join([*rest, *lines, last]) + "\n"


def _together() -> Iterator[Case]:
    kind = "keys that disagree"
    for overrides, words in (
        (["rl.prompts_per_step=8", "rl.minibatch_prompts=3"], "rl.minibatch_prompts"),
        (["reheat.max_tokens=9"], "reheat.max_tokens"),
        (["rollout.max_model_len=10"], "rollout.max_model_len"),
        (["parallel.microbatch_tokens=10"], "parallel.microbatch_tokens"),
        (["eval.max_tokens=8000"], "eval.max_tokens"),
        (["eval.temperature=0", "eval.num_samples=2"], "eval.num_samples"),
        (["reward.correct=0", "reward.incorrect=1"], "reward.correct"),
        (["checkpoint.keep_best=eval/avg_at_k", "eval.data=null"], "checkpoint.keep_best"),
        (["rl.overlong_buffer=9"], "rl.overlong_buffer"),
        (["sft.steps=5", "data.solution_template=null"], "data.solution_template"),
        (["rollout.tensor=2"], "rollout.tensor"),
        (["rollout.overlap=true"], "rollout.overlap"),
        (["rollout.overlap=true", "rollout.mode=server"], "rl.tis_cap"),
        (["rollout.mode=server", "rollout.servers=[http://a:1, http://a:1]"], "rollout.servers"),
        (["rollout.servers=[http://a:1]"], "rollout.servers"),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel"),
        (["controller.collapse_below=0.3", "controller.reheat_to=0.2"], "collapse_below"),
        (["controller.runaway_entropy=0.01"], "runaway_entropy"),
        (["rollout.max_tokens=60", "eval.max_tokens=8"], "rollout.max_tokens"),
        (["parallel.tensor=3"], "parallel.tensor"),
        (["parallel.pipeline=3"], "parallel.pipeline"),
        (["rollout.max_model_len=100000"], "rollout.max_model_len"),
    ):
        command = "check" if overrides[0] in ("parallel.tensor=3", "parallel.pipeline=3") else "train"
        yield override(kind, *overrides, words=(words,), command=command)


# -- files -----------------------------------------------------------------------------------------------------------

Place = Callable[[Bench], str | Path]


def _fifo(bench: Bench) -> Path:
    path = bench.folder / "fifo"
    os.mkfifo(path)
    return path


def _loop(bench: Bench) -> Path:
    path = bench.folder / "loop"
    path.symlink_to(path)
    return path


def _folder(bench: Bench) -> Path:
    (bench.folder / "empty").mkdir()
    return bench.folder / "empty"


PLACES: dict[str, Place] = {
    "missing": lambda bench: bench.folder / "nowhere",
    "FIFO": _fifo,
    "/dev/zero": lambda _: "/dev/zero",
    "/dev/random": lambda _: "/dev/random",
    "/dev/null": lambda _: "/dev/null",
    "/dev/stdin": lambda _: "/dev/stdin",
    "link to itself": _loop,
    "below a file": lambda bench: bench.file("file", "x") / "a",
    "long name": lambda bench: bench.folder / LONG,
    "long path": lambda bench: "/".join([str(bench.folder), *["n" * 200] * 30]),
    "line break": lambda bench: f"{bench.folder}/a\nb",
}
FILE_PLACES: dict[str, Place] = {**PLACES, "empty folder": _folder}


def _recipe_files() -> Iterator[Case]:
    kind = "recipe's path"

    def as_recipe(place: Place) -> Callable[[Bench], list[str | Path]]:
        return lambda bench: ["train", place(bench)]

    def as_base(place: Place) -> Callable[[Bench], list[str | Path]]:
        return lambda bench: ["train", bench.file("recipe.yaml", f"base: {_quoted(place(bench))}\n")]

    for name, place in FILE_PLACES.items():
        words = (str(name).partition(" ")[0], "/", "config file")
        yield Case(kind, name, words, as_recipe(place))
        yield Case("base", name, (*RECIPE, *words), as_base(place))
    yield Case("base", "NUL", (*RECIPE, "base"), lambda bench: ["train", bench.file("recipe.yaml", 'base: "a\\0b"\n')])
    for name, content in {
        "itself": "base: recipe.yaml\n",
        "a list": "base: [a.yaml, b.yaml]\n",
        "a mapping": "base: {a: b}\n",
        "empty text": "base: ''\n",
        "a URL": "base: https://example.com/a.yaml\n",
        "a number": "base: 3\n",
        "a home": "base: ~/none/a.yaml\n",
    }.items():
        yield text("base", name, content, (*RECIPE, "base"))

    def broken_base(bench: Bench) -> list[str | Path]:
        bench.file("base.yaml", "rl: {group_size: [\n")
        return ["train", bench.file("recipe.yaml", "base: base.yaml\n")]

    yield Case("base", "broken", ("base.yaml",), broken_base)


def _quoted(path: str | Path) -> str:
    return '"' + str(path).replace("\n", "\\n").replace("\0", "\\0") + '"'


def _data() -> Iterator[Case]:
    """Mistakes of `data`, each made in `eval.data` as well, which must be named so."""
    for section in ("data", "eval.data"):
        key = section

        def at(place: Place, key: str = key, source: str = "jsonl") -> Callable[[Bench], list[str | Path]]:
            return lambda bench: ["train", bench.recipe(), f"{key}.source={source}", f"{key}.path={place(bench)}"]

        for name, place in FILE_PLACES.items():
            yield Case(f"{section}.path", name, (f"{section}.path",), at(place))
        yield Case(f"{section}.path", "folder for datasets", (f"{section}.path",), at(_folder, source="datasets"))
        for name, content in {
            "empty": "",
            "blank": "\n\n",
            "not JSON": "question,answer\n",
            "a list": "[1]\n",
            "null": "null\n",
            "cut short": '{"question": "1"',
            "a key twice": '{"question": "1", "question": "2", "answer": "1"}\n',
            "nested": "[" * 100_000 + "\n",
            "no answer": '{"question": "1"}\n',
            "no question": '{"answer": "1"}\n',
            "null answer": '{"question": "1", "answer": null}\n',
            "null question": '{"question": null, "answer": "1"}\n',
            "5,000 digits": '{"question": "1", "answer": ' + "9" * 5000 + "}\n",
            "NaN": '{"question": NaN, "answer": "1"}\n',
            "half a pair": '{"question": "\\ud800", "answer": "1"}\n',
            "too long": '{"question": "' + "1" * 50 + '", "answer": "1"}\n',
        }.items():

            def with_file(bench: Bench, content: str = content, key: str = key) -> list[str | Path]:
                return ["train", bench.recipe(), f"{key}.path={bench.file('spoilt.jsonl', content)}"]

            words = (section, "spoilt.jsonl")
            yield Case(f"{section}: a spoilt file", name, words, with_file)
        for suffix, raw in {
            "csv": b'question,answer\n1,"2\n',
            "json": b"[{]",
            "jsonl.gz": b"\x1f\x8b\x08\x00",
            "parquet": b"PAR1",
            "txt": b"1\n",
            "json.gz": b"{}",
        }.items():

            def other(bench: Bench, suffix: str = suffix, raw: bytes = raw, key: str = key) -> list[str | Path]:
                path = bench.file(f"spoilt.{suffix}", raw)
                return ["train", bench.recipe(), f"{key}.source=files", f"{key}.path={path}"]

            yield Case(f"{section}: a spoilt file", suffix, (section, "spoilt."), other)
        for overrides, words in (
            (["path=null"], "path"),
            (["source=reasoning_gym"], "name"),
            (["source=datasets", "path=null"], "name"),
            (["source=reasoning_gym", "name=countdwon"], "name"),
            (["source=reasoning_gym", "name=countdown", "options={a: 1}"], "options"),
            (["source=reasoning_gym", "name=countdown", "options={min_numbers: 9, max_numbers: 2}"], "options"),
            (["source=reasoning_gym", "name=countdown", "options={seed: 1}"], "options"),
            (["source=reasoning_gym", "name=countdown", "options={min_numbers: banana}"], "options"),
            (["options={a: 1}"], "options"),
            (["raw_template={ask}"], "raw_template"),
            (["raw_template={question"], "raw_template"),
            (["raw_template={}"], "raw_template"),
            (["raw_template={question.a}"], "raw_template"),
            (["raw_template={question:>99999999999}"], "raw_template"),
            (["raw_template={question!x}"], "raw_template"),
            (["raw_template={question.__class__}"], "raw_template"),
            (["prompt_key=ask", "template=chat"], "prompt_key"),
            (["answer_key=reply"], "answer_key"),
            (["template=chat", "chat_template_kwargs={tokenize: true}"], "chat_template_kwargs"),
            (["template=chat", "chat_template_kwargs={chat_template: none}"], "chat_template_kwargs"),
            (["template=chat", "chat_template_kwargs={chat_template: '{% for %}'}"], ""),
            (["max_prompt_tokens=1"], "max_prompt_tokens"),
            (["max_prompt_tokens=1", "on_long_prompt=skip"], "max_prompt_tokens"),
        ):
            yield override(
                f"{section}: keys",
                *(f"{key}.{o}" for o in overrides),
                words=(f"{section}.{words}".rstrip("."), f"{section}: source"),
            )
    yield override("data: keys", "data.solution_template={worked}", "sft.steps=2", words=("data.solution_template",))
    yield override("data: keys", "eval.data.path={folder}/train.jsonl", words=("eval.data",))
    yield override("data: keys", "reward.kind=reasoning_gym", words=("reward.kind",))


def _model_paths() -> Iterator[Case]:
    def at(place: Place) -> Callable[[Bench], list[str | Path]]:
        return lambda bench: ["train", bench.recipe(), f"model.hf_path={place(bench)}"]

    for name, place in FILE_PLACES.items():
        yield Case("model.hf_path", name, ("model.hf_path",), at(place))
    for name in (
        "modle",
        "runs/modle",
        "./modle",
        "~/modle",
        "a/b/c",
        "-",
        ".",
        "..",
        "a//b",
        "a b",
        "Ünïcode/x",
        "owner/",
        "/",
        "https://example.com/model",
        "s3://bucket/model",
        "C:\\models\\x",
        "{folder}/train.jsonl",
    ):
        yield override("model.hf_path", f"model.hf_path={name}", words=("model.hf_path",))
        yield override("model.hf_path, check", f"model.hf_path={name}", words=("model.hf_path",), command="check")
    yield text("model.hf_path", "NUL", 'model: {hf_path: "a\\0b"}\ndata: {path: p}\n', ("model.hf_path",))


def _run_folders() -> Iterator[Case]:
    kind = "run.name"
    for name in (
        "../other",
        "..",
        ".",
        "/tmp/other",
        "a/../../b",
        "../../../etc",
        LONG,
        "a\nb",
        "a\tb",
        "a\x1bb",
        " ",
        "~/x/../..",
        "a\u202eb",
        "a\u0085b",
    ):
        yield override(kind, f"run.name={name}", words=("run.name",))
    yield text(kind, "NUL", '{good}\nlogging: {wandb_project: "a\\0b"}\n', ("logging.wandb_project",))
    yield Case(kind, "NUL in the name", ("run.name",), lambda bench: ["train", bench.recipe(run={"name": "a\0b"})])
    kind = "run.folder"
    for value in (
        "",
        "{folder}/{nmae}",
        "{folder}/{0}",
        "{folder}/{",
        "{folder}/{name.a}",
        "/proc/none/x",
        "/dev/null/x",
        "{folder}/train.jsonl",
        "{folder}/train.jsonl/{name}",
        "{folder}/" + LONG,
        "{folder}/a\nb",
        "/sys/x/{name}",
        "{folder}/{name!r}",
        "{folder}/{name:>9999999999}",
    ):
        yield override(kind, f"run.folder={value}", words=("run.folder", "run folder"))
    yield Case(kind, "NUL", ("run.folder",), lambda bench: ["train", bench.recipe(run={"folder": "a\0b"})])

    def at(place: Place) -> Callable[[Bench], list[str | Path]]:
        return lambda bench: ["train", bench.recipe(), f"run.fork_from={place(bench)}"]

    for name, place in FILE_PLACES.items():
        yield Case("run.fork_from", name, ("run.fork_from",), at(place))
    yield Case(
        "run.fork_from", "NUL", ("run.fork_from",), lambda bench: ["train", bench.recipe(run={"fork_from": "a\0b"})]
    )

    def with_latest(content: str | bytes) -> Callable[[Bench], list[str | Path]]:
        def make(bench: Bench) -> list[str | Path]:
            checkpoints = bench.folder / "trunk" / "checkpoints"
            (checkpoints / "step-4").mkdir(parents=True)
            (checkpoints / "step-4" / "state.json").write_bytes(b"{")
            (checkpoints / "latest").write_bytes(content if isinstance(content, bytes) else content.encode())
            return ["train", bench.recipe(), f"run.fork_from={bench.folder / 'trunk'}"]

        return make

    for name, latest in {
        "damaged": "step-4",
        "elsewhere": "../../../x",
        "binary": b"\xff\xfe",
        "missing": "step-9",
    }.items():
        yield Case(
            "run.fork_from", f"{name} checkpoint", ("run.fork_from", "checkpoint", "state.json"), with_latest(latest)
        )


def _rights() -> Iterator[Case]:
    """What another user may not read or write."""
    kind = "rights"

    def closed(path: Path, mode: int = 0o000) -> Path:
        path.chmod(mode)
        return path

    def folder(bench: Bench, mode: int) -> Path:
        path = bench.folder / "closed"
        path.mkdir()
        return closed(path, mode)

    def case(name: str, words: tuple[str, ...], make: Callable[[Bench], list[str | Path]]) -> Case:
        return Case(kind, name, words, make, without_rights=True, copies_model="model" in name)

    yield case("recipe", RECIPE, lambda bench: ["train", closed(bench.recipe())])
    yield case(
        "data",
        ("data.path",),
        lambda bench: ["train", bench.recipe(), f"data.path={closed(bench.file('c.jsonl', '{}'))}"],
    )
    yield case(
        "eval.data",
        ("eval.data.path",),
        lambda bench: ["train", bench.recipe(), f"eval.data.path={closed(bench.file('c.jsonl', '{}'))}"],
    )
    for mode in (0o000, 0o444, 0o555):
        yield case(
            f"run.folder {mode:o}",
            ("run.folder", "run folder"),
            lambda bench, mode=mode: ["train", bench.recipe(), f"run.folder={folder(bench, mode)}/{{name}}"],
        )
        yield case(
            f"run.folder itself {mode:o}",
            ("run.folder", "run folder"),
            lambda bench, mode=mode: ["train", bench.recipe(), f"run.folder={folder(bench, mode)}"],
        )
        if mode != 0o555:
            yield case(
                f"fork_from {mode:o}",
                ("run.fork_from",),
                lambda bench, mode=mode: ["train", bench.recipe(), f"run.fork_from={folder(bench, mode)}"],
            )
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "tokenizer_config.json",
    ):
        yield case(
            f"model's {name}",
            ("model.hf_path",),
            lambda bench, name=name: (closed(bench.model / name), ["train", bench.recipe()])[1],
        )
    yield case("model's folder", ("model.hf_path",), lambda bench: (closed(bench.model), ["train", bench.recipe()])[1])


def _options() -> Iterator[Case]:
    """Of the commands beside `train`."""
    kind = "other commands"
    for arguments, words in (
        (["check", "{recipe}", "--gpu", "h1000"], "--gpu"),
        (["check", "{recipe}", "--gpus", "0"], "--gpus"),
        (["check", "{recipe}", "--gpus", "-3"], "--gpus"),
        (["check", "{recipe}", "--mean-tokens", "nan"], "mean"),
        (["check", "{recipe}", "--mean-tokens", "-1"], "mean"),
        (["check", "{recipe}", "--mean-tokens", "1e30"], "mean"),
        (["check", "{recipe}", "--gpus", "1" + "0" * 30], "parallel.data"),
        (["serve", "{recipe}", "--port", "0"], "--port"),
        (["serve", "{recipe}", "--port", "99999"], "--port"),
        (["serve", "{recipe}", "--host", "no.such.host.invalid"], "--host"),
        (["serve", "{recipe}", "--host", "a b"], "--host"),
        (["serve", "{recipe}", "--servers", "0"], "--servers"),
        (["serve", "{recipe}", "--log-folder", "/dev/null/x"], "--log-folder"),
        (["slurm", "{recipe}", "--nodes", "0", "--dry-run"], "--nodes"),
        (
            ["slurm", "{recipe}", "--nodes", "1", "--cpu-tasks", "1", "--rollout-nodes", "1", "--dry-run"],
            "--rollout-nodes",
        ),
        (["slurm", "{recipe}", "--nodes", "1", "--cpu-tasks", "1", "--dry-run", "--partition", "a\nb"], "--partition"),
        (
            ["slurm", "{recipe}", "--nodes", "1", "--cpu-tasks", "1", "--template", "/nowhere", "--dry-run"],
            "--template",
        ),
        (["slurm", "{recipe}", "--nodes", "1", "--cpu-tasks", "1", "--account", "a\nb", "--dry-run"], "--account"),
        (
            ["slurm", "{recipe}", "--nodes", "1", "--cpu-tasks", "1", "--time", "1:00\n#SBATCH --x", "--dry-run"],
            "--time",
        ),
        (["slurm", "{recipe}", "--nodes", "1", "--cpu-tasks", "1", "--logs", "a\nb", "--dry-run"], "--logs"),
        (["slurm", "{recipe}", "--nodes", "1", "--cpu-tasks", "1", "--container", "a\nb", "--dry-run"], "--container"),
        (["slurm", "{recipe}", "--nodes", "1", "--cpu-tasks", "1", "--venv", "a\nb", "--dry-run"], "--venv"),
        (
            ["slurm", "{recipe}", "data.raw_template=a\n{question}", "--nodes", "1", "--cpu-tasks", "1", "--dry-run"],
            "data.raw_template",
        ),
        (["report", "{folder}"], "metrics.jsonl"),
        (["report", "/nowhere"], "/nowhere"),
        (["convert", "--to-hf", "/nowhere", "{folder}/out"], "/nowhere"),
        (["convert", "--from-hf", "{folder}", "{folder}/out"], "config.json"),
        (
            ["eval", "{model}", "--suite", "reasoning_gym:countdwon", "--template", "{question}"],
            "suite reasoning_gym:countdwon",
        ),
        (["eval", "{model}", "--suite", "math5000", "--template", "{question}"], "math5000"),
        (
            ["eval", "{model}", "--suite", "reasoning_gym:countdown", "--template", "{question", "--limit", "2"],
            "--template",
        ),
        (["eval", "{folder}", "--suite", "reasoning_gym:countdown"], "MODEL"),
        (["eval", "{model}", "--suite", "reasoning_gym:countdown", "--n", "0"], "--n"),
        (["eval", "{model}", "--suite", "reasoning_gym:countdown", "--temperature", "nan"], "--temperature"),
        (["eval", "{model}", "--suite", "reasoning_gym:countdown", "--top-p", "2"], "--top-p"),
        (["eval", "{model}", "--suite", "reasoning_gym:countdown", "--engine", "zzz=1"], "zzz"),
        (
            ["eval", "{model}", "--suite", "reasoning_gym:countdown", "--chat-template-kwargs", "{a: "],
            "--chat-template-kwargs",
        ),
        (["eval", "{model}", "--suite", "reasoning_gym:countdown", "--replicas", "0"], "--replicas"),
    ):

        def make(bench: Bench, arguments: list[str] = arguments) -> list[str]:
            places = {"{recipe}": bench.recipe, "{folder}": lambda: bench.folder, "{model}": lambda: bench.model}
            return [str(places[a]()) if a in places else a.replace("{folder}", str(bench.folder)) for a in arguments]

        yield Case(kind, " ".join([arguments[0], *arguments[2:]]).replace("\n", "\\n")[:60], (words,), make)
