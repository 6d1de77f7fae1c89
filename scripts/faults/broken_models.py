"""Model folders that are broken, each in one way; several would run code if anything in them were executed."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scripts.faults.case import Bench, Case

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Spoil = Callable[[Bench], Any]
CODE = "import os\nopen(os.environ['CANARY'], 'w').close()\n"
# what a template would have to reach to run code
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.open('executed', 'w') }}",
    "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
    "{{ lipsum.__globals__['os'].popen('touch executed').read() }}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').system('touch executed') }}",
    "{{ strftime_now.__globals__ }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ namespace.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}",
    "{{ messages|attr('__class__') }}{{ (messages|attr('__class__')).mro() }}",
)


class _Touch:
    def __reduce__(self) -> Any:
        return exec, (CODE,)


def broken_models() -> list[Case]:
    return [*_configs(), *_contradictions(), *_weights(), *_tokenizers(), *_templates(), *_strange_files(), *_code()]


def _case(kind: str, name: str, spoil: Spoil, *words: str, chat: bool = False, command: str = "train") -> Case:
    def make(bench: Bench) -> Sequence[str | Path]:
        spoil(bench)
        if command == "train":
            return ["train", bench.recipe(), *(["data.template=chat"] if chat else [])]
        return [
            command,
            *{"check": [bench.recipe()], "convert": ["--from-hf", bench.model, bench.folder / "out"]}[command],
        ]

    return Case(f"model: {kind}", name, words or ("model.hf_path",), make, copies_model=True)


def _config_with(*dropped: str, **changes: Any) -> Spoil:
    def spoil(bench: Bench) -> None:
        path = bench.model / "config.json"
        tree = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in tree.items() if key not in dropped}))

    return spoil


def _file(name: str, content: str | bytes) -> Spoil:
    return lambda bench: (bench.model / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _configs() -> Iterator[Case]:
    for name, content in {
        "empty": "",
        "open brace": "{",
        "a list": "[]",
        "no keys": "{}",
        "null": "null",
        "NUL": "\0" * 100,
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "nested": "[" * 100_000,
        "nested objects": '{"a": ' * 50_000,
        "5,000 digits": '{"model_type": "qwen3", "hidden_size": ' + "9" * 5000 + "}",
        "a model_type of a list": '{"model_type": ["qwen3"]}',
        "a model_type of a mapping": '{"model_type": {}}',
        "another family": '{"model_type": "gpt2"}',
        "large": " " * 60_000_000,
    }.items():
        yield _case("config.json", name, _file("config.json", content))
    for name, changes in {
        "hidden_size 10^15": {"hidden_size": 10**15},
        "a billion layers": {"num_hidden_layers": 10**9},
        "10^18 layers": {"num_hidden_layers": 10**18},
        "minus layers": {"num_hidden_layers": -1},
        "half a layer": {"num_hidden_layers": 1.5},
        "layers as text": {"num_hidden_layers": "2"},
        "layers null": {"num_hidden_layers": None},
        "layers true": {"num_hidden_layers": True},
        "vocab 10^12": {"vocab_size": 10**12},
        "vocab 0": {"vocab_size": 0},
        "heads 0": {"num_attention_heads": 0},
        "key/value heads 0": {"num_key_value_heads": 0},
        "head_dim 0": {"head_dim": 0},
        "head_dim -32": {"head_dim": -32},
        "head_dim 7": {"head_dim": 7},
        "context 0": {"max_position_embeddings": 0},
        "context -1": {"max_position_embeddings": -1},
        "context 1e30": {"max_position_embeddings": 1e30},
        "context 10^30": {"max_position_embeddings": 10**30},
        "epsilon NaN": {"rms_norm_eps": float("nan")},
        "epsilon -1": {"rms_norm_eps": -1.0},
        "epsilon as text": {"rms_norm_eps": "1e-6"},
        "epsilon inf": {"rms_norm_eps": float("inf")},
        "epsilon null": {"rms_norm_eps": None},
        "rope_theta NaN": {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
        "rope_theta inf": {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
        "rope a list": {"rope_parameters": [1]},
        "rope as text": {"rope_parameters": "default"},
        "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "initializer NaN": {"initializer_range": float("nan")},
        "initializer -1": {"initializer_range": -1.0},
        "initializer as text": {"initializer_range": "x"},
        "gelu": {"hidden_act": "gelu"},
        "biases": {"attention_bias": True},
        "tied as text": {"tie_word_embeddings": "no"},
        "fp8": {"quantization_config": {"quant_method": "fp8"}},
        "sliding": {"use_sliding_window": True, "sliding_window": 8},
        "layer_types too few": {"layer_types": ["full_attention"]},
        "layer_types unknown": {"layer_types": ["a", "b"]},
        "dtype": {"dtype": "float9"},
        "architecture": {"architectures": ["GPT2LMHeadModel"]},
        "architectures as text": {"architectures": "Qwen3ForCausalLM"},
        "eos beyond": {"eos_token_id": 99},
        "eos as text": {"eos_token_id": "1"},
        "eos nested": {"eos_token_id": [[1]]},
        "pad beyond": {"pad_token_id": 99},
    }.items():
        yield _case("values in config.json", name, _config_with(**changes))


def _contradictions() -> Iterator[Case]:
    for name, changes in {
        "more layers": {"num_hidden_layers": 3},
        "fewer layers": {"num_hidden_layers": 1},
        "hidden_size": {"hidden_size": 64},
        "MLP": {"intermediate_size": 64},
        "vocabulary": {"vocab_size": 23},
        "smaller vocabulary": {"vocab_size": 20},
        "head_dim": {"head_dim": 16},
        "groups": {"num_key_value_heads": 4},
        "heads in unequal groups": {"num_key_value_heads": 3},
        "not tied": {"tie_word_embeddings": False},
        "Llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        "model_type alone": {"model_type": "llama"},
        "context of 8": {"max_position_embeddings": 8},
    }.items():
        yield _case("contradictions", name, _config_with(**changes), "model.hf_path", "max_position_embeddings")
        if name in ("more layers", "vocabulary", "not tied", "Llama"):
            for command in ("check", "convert"):
                yield _case("contradictions", f"{name}, {command}", _config_with(**changes), command=command)


def _with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(bench: Bench) -> None:
        tensors = load_file(bench.model / SINGLE)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, bench.model / SINGLE)

    return spoil


def _header(header: bytes, size: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + body


def _index_to(file: str) -> Spoil:
    def spoil(bench: Bench) -> None:
        names = load_file(bench.model / SINGLE)
        shutil.move(bench.model / SINGLE, bench.folder / "elsewhere.safetensors")
        (bench.model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    return spoil


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def _weights() -> Iterator[Case]:
    tensor = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    for name, content in {
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "a header of 2^63": _header(b"{}", 2**63),
        "a header of 2^40": _header(b"{}", 2**40),
        "a header that is no JSON": _header(b"{{{{"),
        "nested header": _header(b'{"a":' * 100_000),
        "offsets beyond": _header(tensor, body=b"\0\0"),
        "overlapping": _header(
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
            b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            body=b"\0" * 4,
        ),
        "shape that overflows": _header(
            b'{"a": {"dtype": "F32", "shape": [9223372036854775807, 9], "data_offsets": [0, 4]}}', body=b"\0" * 4
        ),
        "unknown dtype": _header(b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', body=b"\0" * 4),
        "no tensors": _header(b"{}"),
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.",
        "a ZIP": b"PK\x03\x04" + b"\0" * 40,
    }.items():
        yield _case("weights", name, _file(SINGLE, content))
    for name, change in {
        "lacks a tensor": lambda t: t.pop(Q_PROJ),
        "one too many": lambda t: t.update({"x": torch.ones(1)}),
        "bias": lambda t: t.update({Q_PROJ.replace("weight", "bias"): torch.ones(128)}),
        "int8": lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)}),
        "transposed": lambda t: t.update({Q_PROJ: t[Q_PROJ].T}),
        "float8": lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.float8_e4m3fn)}),
        "adapter": lambda t: t.update({"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}),
    }.items():
        yield _case("weights", name, _with_tensors(change))
    for file in (
        "../elsewhere.safetensors",
        "/etc/passwd",
        "a/../../elsewhere.safetensors",
        "{absolute}",
        "..",
        ".",
        "",
        "a\0b",
        "nowhere.safetensors",
        "config.json",
        "\\..\\elsewhere.safetensors",
        "~/elsewhere.safetensors",
        "https://example.com/a.safetensors",
        "n" * 300,
    ):
        yield _case("shard index", repr(file)[:40], _absolute_index if file == "{absolute}" else _index_to(file))
    for name, content in {
        "empty": "",
        "no map": "{}",
        "a list": '{"weight_map": []}',
        "numbers": '{"weight_map": {"a": 1}}',
        "null": '{"weight_map": null}',
        "nested": "[" * 100_000,
        "lists": '{"weight_map": {"a": ["x"]}}',
        "a million shards": json.dumps({"weight_map": {f"t{i}": f"m{i}.safetensors" for i in range(100_000)}}),
    }.items():
        yield _case("shard index", name, _file(INDEX, content))
    yield _case(
        "shard index",
        "link to outside that is missing",
        lambda bench: (bench.model / SINGLE).unlink() or (bench.model / SINGLE).symlink_to("/nowhere"),
    )


def _absolute_index(bench: Bench) -> None:
    _index_to(str(bench.folder / "elsewhere.safetensors"))(bench)


def _tokenizers() -> Iterator[Case]:
    def without(*names: str) -> Spoil:
        return lambda bench: [(bench.model / name).unlink() for name in names]

    def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Spoil:
        def spoil(bench: Bench) -> None:
            path = bench.model / "tokenizer.json"
            tree = json.loads(path.read_text())
            change(tree)
            path.write_text(json.dumps(tree))

        return spoil

    yield _case("tokenizer", "missing", without("tokenizer.json"))
    for name, content in {
        "empty": "",
        "no keys": "{}",
        "a list": "[]",
        "nested": "[" * 100_000,
        "version alone": '{"version": "1.0"}',
        "binary": b"\xff\xfe",
    }.items():
        yield _case("tokenizer", name, _file("tokenizer.json", content))
    for name, content in {"empty": "", "a list": "[]", "nested": "[" * 100_000}.items():
        yield _case("tokenizer_config", name, _file("tokenizer_config.json", content))
    for name, change in {
        "beyond the vocabulary": lambda t: t["model"]["vocab"].update({"z": 500}),
        "negative id": lambda t: t["model"]["vocab"].update({"z": -1}),
        "no model": lambda t: t.pop("model"),
        "unknown model": lambda t: t.update(model={"type": "Nope"}),
        "id of 2^40": lambda t: t["model"]["vocab"].update({"z": 2**40}),
        "added token beyond": lambda t: t["added_tokens"].append(
            {
                "id": 900,
                "content": "<z>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ),
        "bad regex": lambda t: t.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
        ),
        "empty vocabulary": lambda t: t["model"].update(vocab={}),
        "no merges": lambda t: t["model"].update(type="BPE", merges=["a b"]),
    }.items():
        yield _case("tokenizer", name, tokenizer(change), "model.hf_path", "the tokenizer does not read")
    for name, content in {
        "empty": "",
        "a list": "[]",
        "text": '{"eos_token_id": "1"}',
        "beyond": '{"eos_token_id": 22}',
        "nested": "[" * 100_000,
    }.items():
        yield _case("generation_config", name, _file("generation_config.json", content))

    def no_eos(bench: Bench) -> None:
        _config_with("eos_token_id")(bench)
        (bench.model / "generation_config.json").write_text("{}")
        path = bench.model / "tokenizer_config.json"
        tree = json.loads(path.read_text())
        tree.pop("eos_token")
        path.write_text(json.dumps(tree))

    yield _case("tokenizer", "no eos anywhere", no_eos)


def _templates() -> Iterator[Case]:
    words = ("data.template", "data.chat_template_kwargs", "model.hf_path")
    for name, template in {
        "does not parse": "{% for %}",
        "open": "{% for m in messages %}",
        "raises": "{{ raise_exception('no system role') }}",
        "divides by zero": "{{ 1 // 0 }}",
        "undefined": "{{ nothing.at.all }}",
        "a number": "{{ 'a' + 1 }}",
        "no filter": "{{ 1|nothing }}",
        "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "loops and prints": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "a macro of itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "a long text": "{{ 'a' * 10 ** 11 }}",
        "a power": "{{ 9 ** (9 ** 9) }}",
        "a padded text": "{{ '%099999999999d' % 1 }}",
        "a list of 10^11": "{{ [1] * 10 ** 11 }}",
        "range of 10^12": "{{ range(10 ** 12)|list }}",
        "nested": "{% if true %}" * 3000,
        "long": "{{ 1 }}" * 2_000_000,
        "text of half a character": "{{ '\ud83d' }}".encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        + "{{ x.y }}",
        "doubles itself": "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}"
        "{{ ns.a }}",
        "lines that make a prompt too long": "{% for i in range(5000) %}1{% endfor %}",
        "characters that the tokenizer lacks": "é" * 300,
    }.items():
        yield _case(
            "chat template", name, _file("chat_template.jinja", template), *words, "data.max_prompt_tokens", chat=True
        )
    yield _case(
        "chat template", "none", lambda bench: (bench.model / "chat_template.jinja").unlink(), *words, chat=True
    )
    yield _case(
        "chat template",
        "a folder",
        lambda bench: ((bench.model / "chat_template.jinja").unlink(), (bench.model / "chat_template.jinja").mkdir()),
        *words,
        chat=True,
    )


def _strange_files() -> Iterator[Case]:
    """Files that are none: a model folder may come from anywhere."""
    for name in (
        "config.json",
        "generation_config.json",
        SINGLE,
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        INDEX,
    ):

        def replaced(how: Callable[[Path], Any], name: str = name) -> Spoil:
            def spoil(bench: Bench) -> None:
                (bench.model / name).unlink(missing_ok=True)
                how(bench.model / name)

            return spoil

        words = ("model.hf_path", "data.template")
        yield _case("not a file", f"{name}: FIFO", replaced(os.mkfifo), *words, chat=True)
        yield _case(
            "not a file", f"{name}: /dev/zero", replaced(lambda path: path.symlink_to("/dev/zero")), *words, chat=True
        )
        yield _case(
            "not a file", f"{name}: link to itself", replaced(lambda path: path.symlink_to(path)), *words, chat=True
        )
        if name != "chat_template.jinja":
            yield _case("not a file", f"{name}: folder", replaced(os.mkdir), *words, chat=True)


def _code() -> Iterator[Case]:
    """Whatever else is wrong with these folders, nothing of them may run."""

    def with_code(name: str, *, tokenizer: bool = False, broken: bool = True) -> Spoil:
        def spoil(bench: Bench) -> None:
            (bench.model / f"{name}.py").write_text(CODE + "class Model: pass\nclass Config: pass\n")
            classes = {
                "AutoConfig": f"{name}.Config",
                "AutoModelForCausalLM": f"{name}.Model",
                "AutoTokenizer": [f"{name}.Tok", None],
            }
            if tokenizer:
                path = bench.model / "tokenizer_config.json"
                path.write_text(
                    json.dumps(
                        {
                            **json.loads(path.read_text()),
                            "auto_map": classes,
                            "trust_remote_code": True,
                            "tokenizer_class": "Tok",
                        }
                    )
                )
                (bench.model / "tokenizer.json").unlink()
            else:
                _config_with(
                    auto_map=classes,
                    trust_remote_code=True,
                    **({"model_type": "mine"} if broken else {"hidden_act": "gelu"}),
                )(bench)

        return spoil

    yield _case("code", "auto_map of another type", with_code("modeling_mine"))
    yield _case("code", "auto_map of a known type", with_code("modeling_mine", broken=False))
    yield _case("code", "auto_map of the tokenizer", with_code("tokenization_mine", tokenizer=True))
    for name in ("__init__", "transformers", "sitecustomize", "conftest", "setup"):
        yield _case(
            "code",
            f"{name}.py",
            lambda bench, name=name: (with_code(name)(bench), (bench.folder / f"{name}.py").write_text(CODE)),
        )
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "consolidated.00.pth", "optimizer.pt"):

        def pickled(bench: Bench, name: str = name) -> None:
            torch.save(_Touch(), bench.model / name)
            (bench.model / SINGLE).unlink()

        yield _case("code", f"a pickle: {name}", pickled)
    yield _case(
        "code",
        "pickles of an index",
        lambda bench: (
            torch.save(_Touch(), bench.model / "a.bin"),
            (bench.model / SINGLE).unlink(),
            (bench.model / INDEX).write_text('{"weight_map": {"a": "a.bin"}}'),
        ),
    )
    for template in ESCAPES:
        spoil = _file("chat_template.jinja", template + "{{ messages.nothing.at_all }}")
        yield _case("code", f"template {template[:40]}", spoil, "data.template", "model.hf_path", chat=True)
    yield _case(
        "code",
        "custom_generate",
        lambda bench: (
            (bench.model / "custom_generate").mkdir(),
            (bench.model / "custom_generate" / "generate.py").write_text(CODE),
            _config_with(hidden_act="x")(bench),
        ),
    )
