"""Bad input ends in one clear sentence that names the key or file and the fix, before any engine or model is started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_reheat.config import Config
from megatron_reheat.data.prompts import PromptCursor
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.recipe import load_config
from megatron_reheat.stages.run import RunState, read_inputs
from megatron_reheat.stages.run_state import read_run_state
from tests.e2e import runs


@pytest.fixture(scope="module")
def good_model(tmp_path_factory) -> Path:
    return runs.make_model_folder(tmp_path_factory.mktemp("bad_input") / "model")


@pytest.fixture
def model(good_model, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(good_model, tmp_path / "model"))


@pytest.fixture
def recipe(model, tmp_path) -> dict[str, Any]:
    return runs.recipe(model, tmp_path)


def read(recipe: dict[str, Any], *overrides: str):
    return read_inputs(configured(recipe, *overrides))


def configured(recipe: dict[str, Any], *overrides: str) -> Config:
    path = Path(recipe["model"]["hf_path"]).parent / "recipe.yaml"
    return load_config(runs.write_recipe(recipe, path), overrides)


def refused(recipe: dict[str, Any], *overrides: str, kind: type[ReheatError] = ConfigError) -> str:
    """The one line that `read_inputs` refuses the recipe with; nothing may have been started by then."""
    with pytest.raises(kind) as caught:
        read(recipe, *overrides)
    assert not dist.is_initialized() and "vllm" not in sys.modules
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_recipe_itself_is_good(recipe):
    inputs = read(recipe)
    assert (len(inputs.prompts), inputs.stop_token_ids, inputs.max_model_len) == (60, (1,), 20)
    assert (inputs.source, inputs.forked) == (None, False)


# -- the model folder ------------------------------------------------------------------------------------------------


def test_missing_model_folder(recipe, tmp_path):
    message = refused(recipe, f"model.hf_path={tmp_path / 'nowhere'}")
    assert message.startswith("model.hf_path: ") and "nowhere does not exist; point it at" in message


def test_folder_without_config(recipe, model):
    (model / "config.json").unlink()
    assert f"model.hf_path: {model} has no config.json; point it at a Hugging Face model folder" == refused(recipe)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_config_that_is_not_one(recipe, model, text):
    (model / "config.json").write_text(text)
    assert f"{model / 'config.json'} is not a JSON object with a model_type" in refused(recipe)


@pytest.mark.parametrize(
    ("model_type", "later"),
    [("gpt2", ""), ("qwen3_moe", " (mixtures of experts are planned for later)"), ("no_such_architecture", "")],
)
def test_unsupported_architecture(recipe, model, model_type, later):
    edit_json(model / "config.json", model_type=model_type)
    assert f"model_type {model_type!r} is not supported{later}; use one of qwen3, qwen2, llama, mistral" in refused(
        recipe
    )


def test_unsupported_variant_of_a_supported_architecture(recipe, model):
    edit_json(model / "config.json", hidden_act="gelu", attention_bias=True)
    assert "not supported: hidden_act 'gelu' (silu is); biases in attention or MLP" in refused(recipe)


def test_folder_without_safetensors(recipe, model):
    (model / "model.safetensors").unlink()
    assert f"{model} has no model.safetensors and no index of shards; save the model as safetensors" in refused(recipe)


def test_truncated_safetensors(recipe, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused(recipe)
    assert f"{weights} cannot be read" in message and message.endswith("copy or download the model again")


def test_index_that_names_a_missing_shard(recipe, model):
    names = dict.fromkeys(load_file(model / "model.safetensors"), "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "model-00001-of-00002.safetensors cannot be read" in refused(recipe)


def test_missing_tensors_are_named(recipe, model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    message = refused(recipe)
    assert "lacks tensors its config.json calls for: model.layers.1.mlp.up_proj.weight; save model and" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensor=3", "parallel.tensor 3 does not divide the model's 4 attention heads; lower it"),
        ("parallel.tensor=4", "parallel.tensor 4 does not divide the model's 2 key/value heads; lower it"),
        ("parallel.pipeline=3", "parallel.pipeline 3 does not divide the model's 2 layers; change it"),
    ],
)
def test_layout_that_does_not_divide_the_model(recipe, override, message):
    assert refused(recipe, override) == message


# -- tokenizer and context -------------------------------------------------------------------------------------------


def test_missing_tokenizer(recipe, model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    message = refused(recipe)
    assert f"{model} has no tokenizer" in message and message.endswith("save the tokenizer next to the model")


def test_damaged_tokenizer(recipe, model):
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    message = refused(recipe)
    assert f"the tokenizer in {model} cannot be read" in message and message.endswith("save it again")


def test_tokenizer_larger_than_the_models_vocabulary(recipe, model):
    edit_json(model / "config.json", vocab_size=20)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:20].clone()
    save_file(tensors, model / "model.safetensors")
    message = refused(recipe)
    assert "token ' ' the id 21, but the model's vocabulary ends at 19; use the tokenizer the model was" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.max_tokens=53"], "data.max_prompt_tokens + rollout.max_tokens = 65 tokens exceeds the model's context"),
        (["reheat.max_tokens=60"], "reheat.max_tokens 60 exceeds rollout.max_tokens 8"),
        (["eval.max_tokens=60"], "eval.data.max_prompt_tokens + eval.max_tokens = 72 tokens exceeds the model's context"),
        (["eval.data.max_prompt_tokens=60"], "eval.data.max_prompt_tokens + eval.max_tokens = 68 tokens exceeds the"),
        (["rollout.max_model_len=80"], "rollout.max_model_len 80 exceeds the model's context of 64 tokens"),
        (["rollout.max_model_len=20", "eval.max_tokens=9"], "= 21 tokens exceeds rollout.max_model_len, 20; lower one"),
    ],
)  # fmt: skip
def test_sequences_longer_than_the_context(recipe, overrides, message):
    assert message in refused(recipe, *overrides)


def test_no_token_ends_a_response(recipe, model):
    edit_json(model / "config.json", eos_token_id=None)
    edit_json(model / "tokenizer_config.json", eos_token=None)
    edit_json(model / "generation_config.json", eos_token_id=None)
    assert "neither tokenizer nor config.json names an eos token" in refused(recipe)


# -- data ------------------------------------------------------------------------------------------------------------


def test_prompt_longer_than_allowed(recipe):
    message = refused(recipe, "data.max_prompt_tokens=3")
    assert "tokens, above data.max_prompt_tokens 3; raise it or set data.on_long_prompt=skip" in message
    skipped = refused(recipe, "data.max_prompt_tokens=3", "data.on_long_prompt=skip")
    assert skipped == "data.max_prompt_tokens 3 skips all 60 prompts; raise it"


def test_empty_and_missing_datasets(recipe, tmp_path):
    recipe["data"] = {"source": "jsonl", "path": str(tmp_path / "empty.jsonl"), "solution_template": "{answer}"}
    recipe["reward"] = {"kind": "math"}
    recipe["eval"] = {}
    recipe["parallel"]["microbatch_tokens"] = 4096
    assert "data.path: cannot read" in refused(recipe, "data.max_prompt_tokens=12")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert refused(recipe, "data.max_prompt_tokens=12").endswith("empty.jsonl holds no records")


def test_evaluation_on_training_data(recipe):
    assert "evaluation prompts are in the training data too" in refused(recipe, "eval.data.seed=1", "eval.data.size=60")


def test_errors_of_evaluation_data_name_its_section(recipe, tmp_path):
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"question": "1"}\n')
    recipe["eval"] = {"data": {"path": str(held_out), "raw_template": "{ask}"}}
    recipe["parallel"]["microbatch_tokens"] = 16384
    message = refused(recipe, "eval.max_tokens=8", "eval.data.max_prompt_tokens=12")
    assert message == (
        f"eval.data.raw_template names 'ask', which record 0 of {held_out} (line 1) lacks; available: question"
    )


def test_worked_answers_longer_than_a_microbatch_or_the_context(recipe, tmp_path):
    recipe["data"] = {"path": str(tmp_path / "a.jsonl"), "raw_template": "{q}", "solution_template": "{a}"}
    recipe["data"]["max_prompt_tokens"] = 12
    recipe["reward"], recipe["eval"] = {"kind": "math"}, {}
    records = [{"q": "1", "a": "1", "answer": "1"}, {"q": "1", "a": "1" * 30, "answer": "1"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(read(recipe).prompts) == 2
    message = refused(recipe, "parallel.microbatch_tokens=31", "data.answer_key=answer")
    place = f"of record 1 of {tmp_path / 'a.jsonl'} (line 2)"
    assert message == (
        f"prompt and worked answer (data.solution_template) {place} have 32 tokens, above parallel.microbatch_tokens 31; "
        "raise that or leave the record out"
    )
    assert len(read(recipe, "parallel.microbatch_tokens=31", "sft.steps=0").prompts) == 2
    records[1]["a"] = "1" * 70
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "have 72 tokens, above the model's context (max_position_embeddings) of 64; raise" in refused(recipe)


# -- starting from another run ---------------------------------------------------------------------------------------


def saved_run(recipe: dict[str, Any], folder: Path, *overrides: str) -> Path:
    """What `read_inputs` sees of a finished run: its stages' state, with the place in the data."""
    config = configured(recipe, *overrides)
    cursor = PromptCursor(read_inputs(config).prompts, seed=config.run.seed, shuffle=config.data.shuffle)
    return write_state(folder, cursor=cursor.state())


def write_state(folder: Path, **state: Any) -> Path:
    checkpoint = folder / "checkpoints" / "step-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(asdict(RunState(step=4, **state))))
    return folder


def test_fork_from_nothing(recipe, tmp_path):
    message = refused(recipe, f"run.fork_from={tmp_path / 'trunk'}")
    assert message.startswith(f"run.fork_from: {tmp_path / 'trunk'} does not exist; name the folder of a run")
    (tmp_path / "trunk" / "checkpoints").mkdir(parents=True)
    assert "trunk has no complete checkpoint under checkpoints/" in refused(recipe, f"run.fork_from={tmp_path}/trunk")


def test_a_template_that_prints_the_date_goes_on_with_that_of_the_first_start(recipe, model, tmp_path):
    """The prompts of a later day would be other ones, and the checkpoint's place in the data would not fit them."""
    template = "{{ strftime_now('%d%m') }}|{% for m in messages %}{{ m.content }}={% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    recipe["data"] |= {"template": "chat", "prompt_key": "metadata.target", "raw_template": "", "source": "files"}
    entries = [{"metadata": {"source_dataset": "countdown", "target": str(n), "expression": "1"}} for n in range(5)]
    recipe["data"] |= {"path": str(tmp_path / "a.jsonl"), "options": None}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    config = configured(recipe, "eval.data=")
    first = read_inputs(config, date(2024, 12, 31))
    assert first.prompts[3].text == "3112|3="
    cursor = PromptCursor(first.prompts, seed=config.run.seed, shuffle=config.data.shuffle)
    write_state(tmp_path / "run", cursor=cursor.state(), date=first.today.isoformat())
    later = read_inputs(config, date(2025, 1, 1))
    assert (later.today, later.prompts.fingerprint) == (first.today, first.prompts.fingerprint)
    assert later.prompts == first.prompts
    # a run that forks from it shares its prompts; one that starts anew has its own day's
    arm = configured(recipe, "eval.data=", "run.name=arm", f"run.fork_from={tmp_path / 'run'}")
    assert read_inputs(arm, date(2025, 1, 1)).prompts == first.prompts
    new = read_inputs(configured(recipe, "eval.data=", "run.name=new"), date(2025, 1, 1))
    assert new.prompts[3].text == "0101|3=" and new.prompts.fingerprint != first.prompts.fingerprint
    assert new.describe()[1] == "the chat template prints the date, 2025-01-01 in all prompts of this run"


@pytest.mark.parametrize(
    ("override", "what"),
    [("data.seed=7", "the prompts themselves"), ("run.seed=7", "run.seed"), ("data.shuffle=false", "data.shuffle")],
)
def test_fork_onto_other_data(recipe, tmp_path, override, what):
    trunk = saved_run(recipe, tmp_path / "trunk")
    inputs = read(recipe, f"run.fork_from={trunk}")
    assert (inputs.source, inputs.forked) == (trunk / "checkpoints" / "step-4", True)
    message = refused(recipe, f"run.fork_from={trunk}", override)
    assert f"place in the data does not fit this run: {what} changed; restore the data section" in message


def test_checkpoint_with_a_damaged_state(recipe, tmp_path):
    trunk = saved_run(recipe, tmp_path / "trunk")
    state = trunk / "checkpoints" / "step-4" / "state.json"
    state.write_text(state.read_text()[:30])
    message = refused(recipe, f"run.fork_from={trunk}", kind=ReheatError)
    assert message == (
        f"{state} is missing or damaged; no earlier checkpoint in {trunk / 'checkpoints'} is whole: "
        "move that folder away to start the run anew"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("step"), "state.json: it lacks the key step"),
        (lambda s: s.update(momentum=1, depth=[]), "this version does not know the keys momentum, depth"),
        (lambda s: s["controller"].update(phase="cold"), "this version does not know the key controller.phase"),
        (
            lambda s: s["controller"].update(stage="sft"),
            "controller.stage: Input should be 'rlvr' or 'reheat', got 'sft'",
        ),
        (lambda s: s.update(step="4"), "step: Input should be a valid integer, got '4'"),
        (lambda s: s.update(controller=None), "controller: Input should be an object, got None"),
        (lambda s: s.update(date="today"), "date 'today' is not a day"),
    ],
)
def test_the_state_of_another_version_is_explained(recipe, tmp_path, change, words):
    trunk = saved_run(recipe, tmp_path / "trunk")
    path = trunk / "checkpoints" / "step-4" / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    message = refused(recipe, f"run.fork_from={trunk}", kind=ReheatError)
    assert message.startswith(str(path)) and words in message and "\n" not in message
    assert "; another version of megatron_reheat wrote it: go on with that version" in message


def test_a_place_in_the_data_of_another_version_is_explained(recipe, tmp_path):
    trunk = saved_run(recipe, tmp_path / "trunk")
    path = trunk / "checkpoints" / "step-4" / "state.json"
    whole = json.loads(path.read_text())
    for change in (lambda c: c.pop("epoch"), lambda c: c.update(offset=3), lambda c: c.update(position=None)):
        state = json.loads(json.dumps(whole))
        change(state["cursor"])
        path.write_text(json.dumps(state))
        message = refused(recipe, f"run.fork_from={trunk}", kind=ReheatError)
        assert f"{path}: its place in the data is" in message
        assert (
            "this version reads epoch, position, seed, shuffle, fingerprint; another version of megatron_reh" in message
        )


def test_what_an_earlier_version_did_not_keep_has_its_default(tmp_path):
    checkpoint = tmp_path / "step-4"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(
        '{"step": 4, "controller": {"stage": "reheat"}, "best": {"eval/avg_at_k": 1}}'
    )
    assert read_run_state(checkpoint) == RunState(4, controller={"stage": "reheat"}, best={"eval/avg_at_k": 1.0})
    for damaged in ("[]", "null", "{", "[" * 100_000, "\x00"):
        (checkpoint / "state.json").write_text(damaged)
        with pytest.raises(ReheatError, match=r"state.json is missing or damaged; no earlier checkpoint in"):
            read_run_state(checkpoint)


# -- the command line ------------------------------------------------------------------------------------------------


def one_error(result: subprocess.CompletedProcess[str], exit_code: int = 1) -> str:
    lines = result.stderr.splitlines()
    assert result.returncode == exit_code, result.stderr[-3000:]
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert "error:" not in result.stdout
    return errors[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.temprature=2", "error: rollout.temprature: unknown key; did you mean 'temperature'?"),
        ("rl.group_size", "error: override 'rl.group_size' is not of the form key=value (e.g. rl.group_size=16)"),
    ],
)
def test_typo_in_the_configuration(recipe, tmp_path, override, message):
    path = runs.write_recipe(recipe, tmp_path / "recipe.yaml")
    assert one_error(runs.reheat("train", str(path), override)) == message


def test_missing_recipe(tmp_path):
    path = tmp_path / "nowhere.yaml"
    assert one_error(runs.reheat("train", str(path))) == f"error: no such config file: {path}"


def test_world_size_that_does_not_fit_the_layout_is_reported_by_one_rank(recipe, tmp_path):
    path = runs.write_recipe(recipe, tmp_path / "recipe.yaml")

    def rank(number: int, world_size: int, *overrides: str) -> subprocess.CompletedProcess[str]:
        environment = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world_size)}
        return runs.reheat("train", str(path), *overrides, **environment)

    assert "start 2 processes or set parallel.data=3" in one_error(rank(0, 3))
    assert "change parallel.tensor or parallel.pipeline" in one_error(rank(0, 3, "parallel.tensor=2"))
    other = rank(1, 3)
    assert (other.returncode, other.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [["trian"], [], ["train"]])
def test_unknown_command(arguments):
    result = runs.reheat(*arguments)
    assert result.returncode == 2 and "usage: reheat" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_an_error_of_every_rank_is_printed_once(recipe, model, tmp_path):
    (model / "model.safetensors").unlink()
    path = runs.write_recipe(recipe, tmp_path / "recipe.yaml")
    assert "has no model.safetensors" in one_error(runs.reheat("train", str(path)))
    assert not (tmp_path / "run").exists()  # an engine would have left a log file in it


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_ranks(recipe, model, tmp_path):
    """The second pipeline stage meets a tensor that is not finite while the first already waits for it in a collective."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors")
    path = runs.write_recipe(recipe, tmp_path / "recipe.yaml")
    result = runs.reheat("train", str(path), "parallel.data=1", "parallel.pipeline=2")
    assert "model.norm.weight holds NaN or infinite values" in one_error(result)
