"""Every way a recipe can be wrong is refused by name, and a right one survives a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.recipe import dump_config, load_config, parse_config
from megatron_reheat.rollout.engine_options import engine_options
from megatron_reheat.stages.outcome import derive_seed

MINIMAL = "model: {hf_path: m}\ndata: {path: p.jsonl}\n"


def recipe(**sections: Any) -> dict[str, Any]:
    """The smallest valid tree with `sections` on top."""
    return {"model": {"hf_path": "m"}, "data": {"path": "p.jsonl"}, **sections}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    return str(caught.value)


def load_refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# --- defaults and immutability


def test_defaults_are_those_of_the_paper() -> None:
    config = parse_config(recipe())
    assert (config.rl.clip_low, config.rl.clip_high, config.rl.group_size) == (0.2, 0.28, 8)
    assert (config.reheat.teacher_temperature, config.reheat.direction, config.reheat.lr) == (1.2, "forward", 1e-6)
    assert (config.controller.collapse_below, config.controller.reheat_to) == (0.08, 0.12)
    assert config.controller.max_reheat_steps == 15


@pytest.mark.parametrize("section", list(Config.model_fields))
def test_every_section_is_frozen(section: str) -> None:
    config = parse_config(recipe())
    part = getattr(config, section)
    field = next(iter(type(part).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, field, getattr(part, field))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, section, part)


def test_a_config_error_is_both_ours_and_a_value_error() -> None:
    assert issubclass(ConfigError, ReheatError) and issubclass(ConfigError, ValueError)


# --- keys


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (recipe(rollouts={}), "rollouts: unknown key; did you mean 'rollout'?"),
        (recipe(rollout={"temprature": 1.0}), "rollout.temprature: unknown key; did you mean 'temperature'?"),
        (
            recipe(eval={"data": {"path": "p", "max_prompt_token": 9}}),
            "eval.data.max_prompt_token: unknown key; did you mean 'max_prompt_tokens'?",
        ),
        (
            recipe(checkpoint={"zzz": 1}),
            "checkpoint.zzz: unknown key; known keys: every, keep, asynchronous, borders, keep_best",
        ),
    ],
)
def test_unknown_keys_come_with_a_suggestion(tree: dict[str, Any], message: str) -> None:
    assert refusal(tree) == message


def test_free_form_options_take_any_key() -> None:
    options = {"min_numbers": 3, "operators": ["+", "-"]}
    data = {"source": "reasoning_gym", "name": "countdown", "options": options}
    assert parse_config(recipe(data=data)).data.options == options


def test_all_problems_are_listed_at_once() -> None:
    assert refusal({"data": {"path": "p"}, "rl": {"grup_size": 4, "clip_low": -1}}) == (
        "model: this key is required; rl.clip_low: Input should be greater than 0, got -1; "
        "rl.grup_size: unknown key; did you mean 'group_size'?"
    )


@pytest.mark.parametrize("value", [None, 3, [1]])
def test_a_section_must_be_a_mapping(value: Any) -> None:
    assert refusal(recipe(rl=value)) == f"rl: must hold keys and values, not {value!r}"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("rl", "group_size", 1),
        ("rl", "group_size", 2.5),
        ("rl", "dual_clip", 1.0),
        ("rl", "aggregation", "median"),
        ("optimizer", "beta1", 1.0),
        ("optimizer", "lr", float("inf")),
        ("optimizer", "lr", float("nan")),
        ("rollout", "temperature", 0),
        ("rollout", "gpu_memory_utilization", 1.1),
        ("eval", "top_p", 0),
        ("run", "steps", -1),
        ("checkpoint", "keep", 0),
        ("parallel", "tensor", 0),
        ("rl", "clip_low", 1.0),
        ("rl", "tis_cap", 0.5),  # would scale down what is exactly on-policy
        ("rl", "group_size", 20_000),
        ("rollout", "temperature", 0.001),  # vLLM samples at 0.01 instead
        ("rollout", "temperature", 2.5),
        ("controller", "rollout_temperature", 2.5),
        ("controller", "rollout_temperature", 0.001),
        ("eval", "temperature", 0.001),
        ("eval", "temperature", -1.0),
        ("eval", "temperature", 2.5),
        ("eval", "num_samples", 20_000),
        ("run", "seed", -1),
        ("run", "seed", 2**32),
        ("data", "seed", -1),
        ("rollout", "timeout_s", 1e9),
        ("reward", "timeout_s", 1e9),
        ("run", "name", ""),
    ],
)
def test_values_out_of_range_are_refused_by_name(section: str, key: str, value: Any) -> None:
    tree = recipe()
    tree[section] = {**tree.get(section, {}), key: value}
    message = refusal(tree)
    assert message.startswith(f"{section}.{key}: ") and repr(value) in message


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"seed": 2**32 - 1}, "data": {"path": "p", "seed": 2**32 - 1}},
        {"rollout": {"temperature": 2.0}, "eval": {"temperature": 0.01}},
        {"eval": {"temperature": 0, "num_samples": 1}},
        {"rl": {"clip_low": 0.999, "tis_cap": 1.0}},
    ],
)
def test_the_borders_of_those_ranges_are_allowed(sections: dict[str, Any]) -> None:
    parse_config(recipe(**sections))


def test_seeds_in_range_are_in_range_for_those_who_use_them() -> None:
    """numpy's global generator is what vLLM seeds; a run hands on its own seed, and derives others from it."""
    for seed in (0, 2**32 - 1):
        np.random.RandomState(seed)
        assert 0 <= derive_seed(seed, 10**6, 10**6) < 2**32
    with pytest.raises(ValueError):
        np.random.RandomState(2**32)


# --- what is typed, and what the field makes of it


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


TYPED = [
    ("run.name", "42", "42"),
    ("run.name", "007", "007"),
    ("run.name", "2024-02-30", "2024-02-30"),
    ("run.name", "true", "true"),
    ("run.name", "1e3", "1e3"),
    ("run.name", "12:30", "12:30"),
    ("run.name", "'42'", "42"),
    ("data.prompt_key", "null", "null"),
    ("data.raw_template", "{question}", "{question}"),
    ("data.raw_template", "[question]", "[question]"),
    ("data.system_prompt", "None", None),
    ("data.system_prompt", "none", None),
    ("data.system_prompt", "null", None),
    ("data.system_prompt", "~", None),
    ("data.system_prompt", "", None),
    ("data.system_prompt", "'none'", "none"),
    ("data.system_prompt", "nonesuch", "nonesuch"),
    ("data.size", "None", None),
    ("data.size", "2_000", 2000),
    ("data.size", "1e3", 1000),
    ("rl.dual_clip", "none", None),
    ("rl.group_size", "010", 10),
    ("rl.group_size", "8.0", 8),
    ("optimizer.lr", "1e-6", 1e-6),
    ("optimizer.lr", "1_0.5", 10.5),
    ("rl.dynamic_sampling", "off", False),
    ("rl.dynamic_sampling", "YES", True),
    ("rl.dynamic_sampling", "0", False),
    ("model.dtype", "bf16", "bfloat16"),
    ("model.dtype", "FP32", "float32"),
    ("model.dtype", "float", "float32"),
    ("rollout.dtype", "torch.bfloat16", "bfloat16"),
    ("model.recompute", "None", "none"),
    ("controller.action", "none", "none"),
    ("checkpoint.keep_best", "None", None),
    ("eval.data", "null", None),
    ("rollout.servers", "[]", ()),
    ("data.options", "{min: 3, p: 1e-3, day: 2024-02-30, on: yes}", {"min": 3, "p": 1e-3, "day": "2024-02-30", "on": True}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "value"), TYPED)
def test_a_value_is_read_as_its_field_asks_for(tmp_path: Path, key: str, text: str, value: Any) -> None:
    """In a file and behind `key=` alike; YAML would make a date, a number or text of most of them, whatever the field."""
    path = write(tmp_path, "r.yaml", MINIMAL)
    assert value_of(load_config(path, [f"{key}={text}"]), key) == value
    *parents, leaf = key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(parents)] + [f"{'  ' * len(parents)}{leaf}: {text}"]
    required = {"model": "  hf_path: m", "data": "  path: p.jsonl"}
    lines.insert(1, required.pop(parents[0], ""))
    file = write(tmp_path, "f.yaml", "\n".join([*lines, *(f"{k}:\n{v}" for k, v in required.items())]))
    assert value_of(load_config(file), key) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Q: {question}\\nA:", "Q: {question}\\nA:"),
        ("{a} and {b}", "{a} and {b}"),
        ("ends in a space ", "ends in a space "),
        ("a # b", "a # b"),
        ("'a' or 'b'", "'a' or 'b'"),
        ("x=y", "x=y"),
    ],
)
def test_text_behind_a_key_needs_no_quotes(tmp_path: Path, text: str, value: str) -> None:
    assert load_config(write(tmp_path, "r.yaml", MINIMAL), [f"data.raw_template={text}"]).data.raw_template == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.group_size=abc", ["valid integer", "got 'abc'"]),
        ("rl.group_size=8.5", ["valid integer", "got '8.5'"]),
        ("rl.group_size=true", ["valid integer", "got 'true'"]),
        ("rl.group_size=", ["valid integer", "got ''"]),
        ("optimizer.lr=inf", ["finite", "got 'inf'"]),
        ("rl.dynamic_sampling=maybe", ["valid boolean", "got 'maybe'"]),
        ("rl.aggregation=median", ["'token_mean' or 'sequence_mean'", "got 'median'"]),
        ("model.dtype=fp16", ["'fp16' is not supported", "loss scaling", "bfloat16"]),
        ("rollout.dtype=half", ["'half' is not supported"]),
        ("model.dtype=fp64", ["got 'fp64'"]),
        ("data.options=5", ["valid dictionary", "got '5'"]),
        ("rollout.servers=[http://a:99999]", ["rollout.servers.0", "'http://a:99999' is not the URL of a server"]),
    ],
)
def test_an_error_shows_what_was_given_and_where(tmp_path: Path, override: str, words: list[str]) -> None:
    path = write(tmp_path, "r.yaml", MINIMAL)
    message = load_refusal(path, override)
    key, _, text = override.partition("=")
    assert message.startswith(key) and message.endswith(" (on the command line)"), message
    assert all(word in message for word in words), message
    section, _, leaf = key.partition(".")
    write(tmp_path, "base.yaml", f"{section}:\n  {leaf}: {text}\n")
    leaf_file = write(
        tmp_path, "leaf.yaml", "base: base.yaml\n" + ("" if section == "model" else "model: {hf_path: m}\n")
    )
    assert "(base.yaml, line 2)" in load_refusal(leaf_file), load_refusal(leaf_file)


def test_an_error_names_the_file_that_had_the_last_word(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", MINIMAL + "rl: {group_size: 1}\nrun: {sed: 1}\n")
    path = write(tmp_path, "leaf.yaml", "base: base.yaml\n\nrl:\n  group_size: x\n")
    message = load_refusal(path)
    assert "got 'x' (leaf.yaml, line 4)" in message
    assert "run.sed: unknown key; did you mean 'seed'? (base.yaml, line 4)" in message


def test_a_key_without_its_section_is_led_home(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", MINIMAL)
    assert load_refusal(path, "clip_low=0.1") == "clip_low: unknown key; did you mean rl.clip_low?"
    assert "did you mean rl.group_size or reheat.group_size?" in load_refusal(path, "group_size=4")


def test_yaml_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-6 as text
    path = write(tmp_path, "r.yaml", MINIMAL + "optimizer: {lr: 1e-6}\n")
    assert load_config(path).optimizer.lr == 1e-6
    assert load_config(path, ["optimizer.lr=3e-4"]).optimizer.lr == 3e-4


# --- files and inheritance


def test_a_recipe_holds_only_what_differs_from_its_base(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", MINIMAL + "rl: {group_size: 4, clip_high: 0.3}\nrun: {seed: 1}\n")
    write(tmp_path, "mid/mid.yaml", "base: ../base.yaml\nrl: {group_size: 6}\n")
    leaf = write(tmp_path, "mid/leaf.yaml", "base: mid.yaml\nrun: {name: leaf}\n")
    config = load_config(leaf)
    assert (config.rl.group_size, config.rl.clip_high) == (6, 0.3)
    assert (config.run.seed, config.run.name) == (1, "leaf")


def test_lists_and_nulls_replace_what_the_base_says(tmp_path: Path) -> None:
    base = "model: {hf_path: m}\ndata: {source: reasoning_gym, name: a, options: {ops: ['+', '-'], n: 3}}\n"
    write(tmp_path, "base.yaml", base + "rl: {dual_clip: 5}\n")
    leaf = write(tmp_path, "leaf.yaml", "base: base.yaml\ndata: {options: {ops: ['*']}}\nrl: {dual_clip: null}\n")
    config = load_config(leaf)
    assert config.data.options == {"ops": ["*"], "n": 3}
    assert config.rl.dual_clip is None


@pytest.mark.parametrize("key", ["options", "chat_template_kwargs"])
def test_null_takes_back_what_a_base_passes_on(tmp_path: Path, key: str) -> None:
    base = f"model: {{hf_path: m}}\ndata: {{source: datasets, name: a, {key}: {{name: en, deep: {{x: 1}}}}}}\n"
    base += f"eval: {{data: {{path: p, {key}: {{name: en}}}}}}\n"
    path = write(tmp_path, "base.yaml", base)
    cleared = write(tmp_path, "cleared.yaml", f"base: base.yaml\ndata: {{{key}: null}}\neval: {{data: {{{key}: }}}}\n")
    config = load_config(cleared)
    assert config.eval.data is not None
    assert getattr(config.data, key) == getattr(config.eval.data, key) == {}
    assert config.data.name == "a" and config.eval.data.path == "p"
    # what comes later may put something else in its place
    write(tmp_path, "leaf.yaml", f"base: cleared.yaml\ndata: {{{key}: {{b: 2}}}}\n")
    assert getattr(load_config(tmp_path / "leaf.yaml").data, key) == {"b": 2}
    assert getattr(load_config(path, [f"data.{key}={{b: 2}}"]).data, key) == {"b": 2}
    for text in ("null", "", "{}", "~"):
        assert getattr(load_config(path, [f"data.{key}={text}"]).data, key) == {}
    # inside, a null is a value like any other
    write(tmp_path, "inner.yaml", f"base: base.yaml\ndata: {{{key}: {{deep: null}}}}\n")
    assert getattr(load_config(tmp_path / "inner.yaml").data, key) == {"name": "en", "deep": None}
    assert "data.options: Input should be a valid dictionary" in load_refusal(path, "data.options=3")


def test_an_evaluation_can_be_taken_back(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", MINIMAL + "eval: {data: {path: h}}\n")
    assert load_config(write(tmp_path, "leaf.yaml", "base: base.yaml\neval: {data: null}\n")).eval.data is None


def test_a_list_of_files_survives_a_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "model: {hf_path: m}\ndata: {path: [a.jsonl, b.parquet]}\n")
    config = load_config(path)
    assert config.data.path == ("a.jsonl", "b.parquet")
    assert load_config(write(tmp_path, "dump.yaml", dump_config(config))) == config
    assert load_config(path, ["data.path=[c.csv]"]).data.path == ("c.csv",)
    assert load_config(path, ["data.path=c.csv"]).data.path == "c.csv"
    assert load_refusal(path, "data.path=[]").startswith(
        "data.path: must be a file, a folder or a list of files, not []"
    )


def test_a_loop_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    path = write(tmp_path, "b.yaml", "base: a.yaml\n")
    assert load_refusal(path).endswith("base files form a loop: b.yaml -> a.yaml -> b.yaml")
    assert "loop: c.yaml -> c.yaml" in load_refusal(write(tmp_path, "c.yaml", "base: c.yaml\n"))


def test_one_base_may_be_reached_twice_in_different_recipes(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", MINIMAL)
    for name in ("a.yaml", "b.yaml"):
        assert load_config(write(tmp_path, name, "base: base.yaml\n")).model.hf_path == "m"


def test_missing_files_are_named_with_whoever_asked_for_them(tmp_path: Path) -> None:
    assert load_refusal(tmp_path / "none.yaml") == f"no such config file: {tmp_path / 'none.yaml'}"
    path = write(tmp_path, "leaf.yaml", "base: gone.yaml\n")
    assert load_refusal(path) == f"no such config file: {tmp_path / 'gone.yaml'}, named as base by {path}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rl: [1, 2\n", "is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping of sections, not a list"),
        ("base: [a.yaml]\n", "base must be the path of one recipe, not ['a.yaml']"),
        ("", "model: this key is required; data: this key is required"),
        ("rl: {group_size: 2}\nrun: {}\nrl: {clip_low: 0.1}\n", "line 3: rl is given a second time, first in line 1"),
        ("rl:\n  group_size: 2\n  group_size: 4\n", "line 3: rl.group_size is given a second time"),
        ("data:\n  raw_template: Q: {question}\n", "line 2, column 18: mapping values are not allowed here"),
        ("rl: !ruby {a: 1}\n", "line 1: the tag !ruby has no meaning here"),
        ("rollout:\n  servers: &a\n  - *a\n", "line 2, column 12: found unconstructable recursive node"),
        ("run: " + "[" * 400 + "]" * 400, "nested too deeply"),
        ("run: {name: 2024-02-30\n", "is not valid YAML"),
        ("? [a]\n: 1\n", "line 1: a key must be a word"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in load_refusal(write(tmp_path, "r.yaml", text))


def test_a_folder_or_binary_file_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be read" in load_refusal(tmp_path)
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in load_refusal(path)


# --- overrides


def test_overrides_win_and_the_last_one_counts(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", MINIMAL + "rl: {group_size: 4, clip_low: 0.1}\n")
    config = load_config(path, ["rl.group_size=8", "rl.group_size=16", "run.name=x=y", "rl.dual_clip="])
    assert (config.rl.group_size, config.rl.clip_low) == (16, 0.1)
    assert config.run.name == "x=y"
    assert config.rl.dual_clip is None


def test_a_section_as_a_value_changes_what_it_names(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", MINIMAL + "rl: {group_size: 4, clip_low: 0.1}\neval: {data: null}\n")
    config = load_config(path, ["rl={clip_low: 0.3}", " run.steps = 7", "eval.data.path=held.jsonl"])
    assert (config.rl.group_size, config.rl.clip_low, config.run.steps) == (4, 0.3, 7)
    assert config.eval.data is not None
    options = write(tmp_path, "o.yaml", MINIMAL + "eval: {data: {path: h, options: {a: 1}}}\n")
    assert load_config(options, ["eval.data.options={b: 2}"]).eval.data.options == {"b": 2}


def test_overrides_reach_sections_the_recipe_does_not_mention(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", MINIMAL)
    config = load_config(path, ["eval.data.path=held.jsonl", "data.options={a: [1, 2]}", "logging.console=false"])
    assert config.eval.data is not None and config.eval.data.path == "held.jsonl"
    assert config.data.options == {"a": [1, 2]}
    assert config.logging.console is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.group_size", "override 'rl.group_size' is not of the form key=value (e.g. rl.group_size=16)"),
        ("=3", "override '=3' is not of the form key=value (e.g. rl.group_size=16)"),
        ("model.hf_path.x=1", "override model.hf_path.x: hf_path is a value, not a section"),
        ("data.options={a: ", "override data.options: '{a: ' is not a valid YAML value; quote it"),
        ("rl.group_sise=4", "rl.group_sise: unknown key; did you mean 'group_size'?"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    assert load_refusal(write(tmp_path, "r.yaml", MINIMAL), override) == message


# --- checks across fields


@pytest.mark.parametrize(
    ("tree", "keys"),
    [
        (recipe(data={"source": "reasoning_gym"}), ["data: source reasoning_gym needs `name`"]),
        (recipe(data={"source": "jsonl"}), ["data: source jsonl needs `path`"]),
        (recipe(data={"source": "datasets"}), ["data: source datasets needs `name`"]),
        (recipe(reheat={"teacher_temperature": 1.0}), ["reheat: teacher_temperature 1 has no loss"]),
        (
            recipe(reheat={"teacher_temperature": 0.8}),
            ["reheat.teacher_temperature 0.8 is below 1", "controller.action=cool"],
        ),
        (
            recipe(controller={"action": "cool", "cool_above": 0.6, "cool_to": 0.4}),
            ["controller.action=cool needs reheat.teacher_temperature below 1, and it is 1.2"],
        ),
        (recipe(controller={"action": "cool", "cool_to": 0.4}), ["controller: action=cool needs cool_above"]),
        (recipe(controller={"action": "cool", "cool_above": 0.4}), ["controller: action=cool needs cool_to"]),
        (
            recipe(controller={"action": "cool", "cool_above": 0.4, "cool_to": 0.4}),
            ["controller: need cool_to < cool_above, got 0.4 and 0.4"],
        ),
        (recipe(controller={"cool_to": 0.4}), ["controller: cool_to would not be read with action=reheat"]),
        (recipe(controller={"collapse_below": 0.12}), ["controller: need collapse_below < reheat_to", "0.12, 0.12"]),
        (recipe(controller={"reheat_to": 0.5}), ["reheat_to < runaway_entropy", "0.08, 0.5"]),
        (recipe(run={"folder": "runs/{nmae}"}), ["run.folder: 'runs/{nmae}' may hold {name} in braces"]),
        (recipe(run={"folder": "runs/{name.x}"}), ["run.folder: "]),
        (recipe(run={"folder": "runs/{"}), ["run.folder: "]),
        (
            recipe(rl={"prompts_per_step": 64, "minibatch_prompts": 48}),
            ["rl.prompts_per_step 64 is not a multiple of rl.minibatch_prompts 48"],
        ),
        (
            recipe(rollout={"max_model_len": 6143}),
            ["data.max_prompt_tokens 2048", "longest response 4096", "rollout.max_model_len 6143"],
        ),
        (
            recipe(rollout={"max_tokens": 512}, reheat={"max_tokens": 513}),
            ["reheat.max_tokens 513 exceeds rollout.max_tokens 512", "lower reheat.max_tokens"],
        ),
        (
            recipe(parallel={"microbatch_tokens": 6143}),
            ["parallel.microbatch_tokens 6143", "raise parallel.microbatch_tokens to 6144"],
        ),
        (
            recipe(parallel={"microbatch_tokens": 10239}, eval={"data": {"path": "h"}}),
            ["eval.data.max_prompt_tokens + eval.max_tokens = 10240", "parallel.microbatch_tokens 10239"],
        ),
        (recipe(rollout={"tensor": 2}), ["rollout.tensor needs rollout.mode colocated or server"]),
        (recipe(rollout={"servers": ["http://a:1"]}), ["rollout.servers needs rollout.mode=server"]),
        (
            recipe(rollout={"mode": "server", "servers": ["gpu-7:8300"]}),
            ["rollout.servers", "'gpu-7:8300' is not the URL"],
        ),
        (recipe(rollout={"overlap": True}, rl={"tis_cap": 2.0}), ["rollout.overlap needs rollout.mode=server"]),
        (recipe(rl={"max_staleness": 1, "dynamic_sampling": False}), ["rl.max_staleness needs rl.dynamic_sampling"]),
        (
            recipe(rollout={"mode": "server", "servers": ["http://a:1", "http://a:1"]}),
            ["rollout.servers names a server twice"],
        ),
        (recipe(eval={"temperature": 0}), ["eval.temperature 0 is greedy", "eval.num_samples 8", "eval.num_samples=1"]),
        (recipe(reward={"correct": -1.0}), ["reward.correct -1 must be above reward.incorrect 0"]),
        (recipe(reward={"incorrect": 1.0}), ["reward.correct 1 must be above reward.incorrect 1"]),
        (recipe(rl={"overlong_buffer": 4097}), ["rl.overlong_buffer 4097 exceeds rollout.max_tokens 4096"]),
        (recipe(checkpoint={"keep_best": "eval/avg_at_k"}), ["checkpoint.keep_best needs eval.data"]),
        (recipe(checkpoint={"keep_best": "reward/mean"}), ["checkpoint.keep_best: must be eval/avg_at_k"]),
        (recipe(sft={"steps": 1}), ["sft.steps needs data.solution_template"]),
        (recipe(parallel={"sequence_parallel": True}), ["parallel.sequence_parallel needs parallel.tensor > 1"]),
        (
            recipe(parallel={"virtual_pipeline": 2}),
            ["parallel.virtual_pipeline needs parallel.pipeline > 1", "set it to 1"],
        ),
        (
            recipe(parallel={"context": 4}, data={"path": "p", "max_prompt_tokens": 3}, rollout={"max_tokens": 4}),
            ["parallel.context 4 cuts every sequence into 8 chunks", "has 7 tokens; lower parallel.context"],
        ),
    ],
)
def test_fields_that_disagree_are_named(tree: dict[str, Any], keys: list[str]) -> None:
    message = refusal(tree)
    assert all(key in message for key in keys), message


@pytest.mark.parametrize(
    "sections",
    [
        {"rl": {"prompts_per_step": 64, "minibatch_prompts": 32}},
        {"rollout": {"max_model_len": 6144}, "parallel": {"microbatch_tokens": 6144}},
        {"rl": {"overlong_buffer": 4096}},
        {"checkpoint": {"keep_best": "eval/pass_at_k"}, "eval": {"data": {"path": "h"}}},
        {"parallel": {"sequence_parallel": True, "tensor": 2}},
        {"parallel": {"virtual_pipeline": 2, "pipeline": 2}},
        {
            "parallel": {"context": 4},
            "data": {"path": "p", "max_prompt_tokens": 4},
            "rollout": {"max_tokens": 4},
            "reheat": {"max_tokens": 4},
            "rl": {"overlong_buffer": 0},
        },
        {"parallel": {"microbatch_tokens": 10240}, "eval": {"data": {"path": "h"}}},
        {"data": {"path": "p", "solution_template": "{answer}"}, "sft": {"steps": 1}},
        {"data": {"source": "datasets", "path": "folder"}},
        {"data": {"source": "reasoning_gym", "name": "countdown"}, "reward": {"kind": "reasoning_gym"}},
    ],
)
def test_the_borders_of_those_checks_are_allowed(sections: dict[str, Any]) -> None:
    parse_config(recipe(**sections))


def test_reheat_length_does_not_matter_when_the_controller_never_reheats() -> None:
    parse_config(recipe(rollout={"max_tokens": 512}, reheat={"max_tokens": 513}, controller={"action": "none"}))


# --- layout against the number of processes


@pytest.mark.parametrize(
    ("parallel", "world_size", "replicas"),
    [
        ({}, None, 1),
        ({"data": 4}, None, 4),
        ({}, 6, 6),
        ({"tensor": 2, "pipeline": 2}, 8, 2),
        ({"tensor": 2, "data": 3}, 6, 3),
        ({"tensor": 2, "context": 2}, 12, 3),
    ],
)
def test_data_parallel(parallel: dict[str, int], world_size: int | None, replicas: int) -> None:
    assert parse_config(recipe(parallel=parallel)).data_parallel(world_size) == replicas


@pytest.mark.parametrize(
    ("parallel", "world_size", "fix"),
    [
        ({"tensor": 2, "pipeline": 2}, 6, "start a multiple of 4 processes"),
        ({"tensor": 2, "data": 2}, 6, "start 4 processes or set parallel.data=3"),
        ({"data": 2}, 1, "start 2 processes or set parallel.data=1"),
        (
            {"context": 2},
            3,
            "parallel.tensor x parallel.pipeline x parallel.context = 1 x 1 x 2 = 2; change parallel.tensor or "
            "parallel.pipeline or parallel.context, or start a multiple of 2 processes",
        ),
        ({"context": 2, "data": 2}, 2, "start 4 processes or set parallel.data=1"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_with_the_fix(parallel: dict[str, int], world_size: int, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(recipe(parallel=parallel)).data_parallel(world_size)
    assert str(caught.value).startswith(f"WORLD_SIZE {world_size} is not ") and str(caught.value).endswith(fix)


# --- dump and load


def test_a_dump_loads_back_to_the_same_config(tmp_path: Path) -> None:
    data = {
        "source": "reasoning_gym",
        "name": "countdown",
        "options": {"ops": ["+", "*"], "n": 3},
        "raw_template": "a: {b}\n",
    }
    config = parse_config(
        recipe(
            data=data,
            eval={"data": data, "top_p": 0.7},
            reheat={"lr": 1e-6},
            rl={"dual_clip": None},
            run={"name": "no", "fork_from": "None"},
        )
    )
    path = write(tmp_path, "dump.yaml", dump_config(config))
    assert load_config(path) == config
    assert load_config(path, ["run.seed=1"]) != config


def test_the_run_folder_follows_the_name() -> None:
    assert parse_config(recipe(run={"name": "a"})).run.path == Path("runs/a")
    assert parse_config(recipe(run={"name": "a", "folder": "elsewhere"})).run.path == Path("elsewhere")


def test_vllm_on_a_gpu_gets_room_for_a_token_of_every_sequence() -> None:
    """vLLM refuses to start with `max_num_batched_tokens`, 2048 by default there, below `max_num_seqs`."""
    for count, expected in ((2048, None), (4096, 4096)):
        rollout = parse_config(recipe(rollout={"max_num_seqs": count})).rollout
        options = engine_options(rollout, "m", dtype="bfloat16", seed=0, on_cpu=False)
        assert options.get("max_num_batched_tokens") == expected
