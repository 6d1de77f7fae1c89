"""What `reheat convert` refuses, reads and writes, on checkpoints made by torch's own writer; real ones: tests/distributed."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.countdown_cpu.make_model import make_tokenizer
from megatron_reheat.cli import main
from megatron_reheat.commands.convert import _engine_gap, as_hf_folder, from_hf, to_hf
from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.model.card_usage import renamed, usage
from megatron_reheat.model.carried_files import read_carried_files
from megatron_reheat.model.checkpoint import digest, verify_checkpoint
from megatron_reheat.model.checkpoint_reader import CheckpointReader
from megatron_reheat.model.conversion import Reference, compare_with_transformers
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.model_card import model_card, without_paths
from megatron_reheat.recipe import dump_config, parse_config
from megatron_reheat.run_folder import read_config_tree
from tests.hostile_checkpoints import PAYLOADS, REASONS, tamper
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

# torch's writer says that it works without a process group, which is the point
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
LAYERS, HIDDEN, HEAD_DIM, GROUPS, PER_GROUP = 4, 48, 6, 4, 2
PADDED = VOCAB_SIZE + 5


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("hf") / "llama")
    make_tokenizer().save_pretrained(folder)
    return folder


def megatron_tensors(hf_folder):
    """The Llama folder's tensors as Megatron stores them, written out by hand."""
    reader = HFReader(hf_folder)

    def stack(make):
        return torch.stack([make(f"model.layers.{i}") for i in range(LAYERS)])

    def qkv(layer):
        q, k, v = (reader.get(f"{layer}.self_attn.{n}_proj.weight") for n in "qkv")
        rows = []
        for group in range(GROUPS):
            rows += [q[group * PER_GROUP * HEAD_DIM : (group + 1) * PER_GROUP * HEAD_DIM]]
            rows += [k[group * HEAD_DIM : (group + 1) * HEAD_DIM], v[group * HEAD_DIM : (group + 1) * HEAD_DIM]]
        return torch.cat(rows)

    def padded(name):
        return torch.cat([reader.get(name), torch.full((PADDED - VOCAB_SIZE, HIDDEN), 7.0)])

    layers = {
        "self_attention.linear_qkv.layer_norm_weight": lambda at: reader.get(f"{at}.input_layernorm.weight"),
        "self_attention.linear_qkv.weight": qkv,
        "self_attention.linear_proj.weight": lambda at: reader.get(f"{at}.self_attn.o_proj.weight"),
        "mlp.linear_fc1.layer_norm_weight": lambda at: reader.get(f"{at}.post_attention_layernorm.weight"),
        "mlp.linear_fc1.weight": lambda at: torch.cat(
            [reader.get(f"{at}.mlp.{n}_proj.weight") for n in ("gate", "up")]
        ),
        "mlp.linear_fc2.weight": lambda at: reader.get(f"{at}.mlp.down_proj.weight"),
    }
    return {
        "embedding.word_embeddings.weight": padded("model.embed_tokens.weight"),
        "output_layer.weight": padded("lm_head.weight"),
        "decoder.final_layernorm.weight": reader.get("model.norm.weight"),
        **{f"decoder.layers.{name}": stack(make) for name, make in layers.items()},
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(HIDDEN),
    }


def save_run(run, hf_path, tensors):
    """As an earlier version wrote it: the checkpoint carries neither configuration nor tokenizer."""
    checkpoint = run / "checkpoints" / "step-30"
    checkpoint.mkdir(parents=True)
    dcp.save(tensors, checkpoint_id=checkpoint, no_dist=True)
    state = {"step": 30, "policy_version": 29, "controller": {"stage": "reheat", "round": 2}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    tree = {"model": {"hf_path": str(hf_path)}, "run": {"name": "trial"}, "reheat": {"teacher_temperature": 1.2}}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    lines = [
        {"step": 20, "entropy/mean": 0.5, "eval/pass_at_k": 0.75},
        {"step": 30, "entropy/mean": 0.25},
        {"step": 31, "entropy/mean": 9.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return checkpoint


def seal(checkpoint):
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    manifest = {str(path.relative_to(checkpoint)): digest(path) for path in files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def run(tmp_path, hf_folder):
    save_run(tmp_path / "trial", hf_folder, megatron_tensors(hf_folder))
    return tmp_path / "trial"


@pytest.fixture
def alone(run, hf_folder, tmp_path):
    """A checkpoint that carries its files, copied elsewhere; run folder and model folder are gone."""
    model = edit_config(hf_folder, tmp_path / "model")
    text = (run / "config.yaml").read_text().replace(str(hf_folder), str(model))
    for name, content in read_carried_files(text, model).items():
        path = run / "checkpoints" / "step-30" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    seal(run / "checkpoints" / "step-30")
    (tmp_path / "backup").mkdir()
    copy = shutil.copytree(run / "checkpoints" / "step-30", tmp_path / "backup" / "step-30")
    shutil.rmtree(run)
    shutil.rmtree(model)
    return copy


def test_layouts_are_undone_and_the_padding_is_dropped(run, hf_folder, tmp_path):
    to_hf(run, tmp_path / "out", shard_gb=5e-5, verify=False)
    original, converted = HFReader(hf_folder), HFReader(tmp_path / "out")
    assert converted.names() == original.names()
    for name in original.names():
        assert torch.equal(converted.get(name), original.get(name)), name
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and all(p.stat().st_mode & 0o044 for p in shards)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert not (tmp_path / ".out.partial").exists()


def test_a_checkpoint_is_found_from_its_run_folder_and_by_itself(run, tmp_path):
    by_run = to_hf(run, tmp_path / "a", verify=False)
    by_checkpoint = to_hf(run / "checkpoints" / "step-30", tmp_path / "b", verify=False)
    assert by_run.replace("/a:", "/b:") == by_checkpoint
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_checkpoint_is_converted_by_itself(alone, hf_folder, tmp_path):
    assert verify_checkpoint(alone) is None
    assert not any(path.suffix == ".safetensors" for path in alone.rglob("*"))
    to_hf(alone, tmp_path / "out", verify=False)
    original, converted = HFReader(hf_folder), HFReader(tmp_path / "out")
    assert all(torch.equal(converted.get(name), original.get(name)) for name in original.names())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (hf_folder / "tokenizer.json").read_bytes()
    assert "# trial, step 30" in (tmp_path / "out" / "README.md").read_text()
    with as_hf_folder(str(alone), "latest", None) as (_, folder):
        assert HFReader(Path(folder)).names() == original.names()
    assert [path.name for path in alone.parent.iterdir()] == ["step-30"]


def test_a_checkpoints_own_files_come_before_the_models_folder_and_hf_source_before_them(alone, hf_folder, tmp_path):
    changed = edit_config(hf_folder, tmp_path / "model", max_position_embeddings=99)  # since the run has begun
    to_hf(alone, tmp_path / "own", verify=False)
    to_hf(alone, tmp_path / "given", hf_source=str(changed), verify=False)
    lengths = [
        json.loads((tmp_path / name / "config.json").read_text())["max_position_embeddings"]
        for name in ("own", "given")
    ]
    assert lengths == [256, 99]


@pytest.mark.parametrize("name", ["config.yaml", "hf/config.json", "hf/tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"{}"])
def test_damage_to_what_a_checkpoint_carries_is_named_first(name, content, alone, tmp_path):
    (alone / name).unlink() if content is None else (alone / name).write_bytes(content)
    for check in (lambda: to_hf(alone, tmp_path / "out"), lambda: to_hf(alone, tmp_path / "out", hf_source="gone/a/b")):
        with pytest.raises(
            ReheatError, match=rf"^{alone / name} is missing or damaged \(its digest differs from manifest"
        ):
            check()
    problem = verify_checkpoint(alone)
    assert (
        f"{alone / name} is missing or damaged" in problem and "copy the checkpoint again from where its run" in problem
    )


def test_a_manifest_names_files_of_the_checkpoint_alone(alone):
    for name in ("hf/../../x", "hf/deeper/x", "../x", "/etc/passwd"):
        manifest = json.loads((alone / "manifest.json").read_text())
        (alone / "manifest.json").write_text(json.dumps({name: "0", **manifest}))
        assert f"it names {name}, outside the checkpoint" in verify_checkpoint(alone)
        (alone / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_is_written_out_for_as_long_as_it_is_looked_at(run, hf_folder):
    with as_hf_folder(str(run), "latest", None) as (name, folder):
        assert name == str(run / "checkpoints" / "step-30")
        assert HFReader(Path(folder)).names() == HFReader(hf_folder).names()
    assert not Path(folder).exists() and not list(run.rglob(".hf-*"))
    with as_hf_folder(str(run / "checkpoints" / "step-30"), "best", None) as (name, folder):
        assert name.endswith("step-30") and Path(folder).exists()
    called_like_one = shutil.copytree(hf_folder, run.parent / "step-7")
    for model in (str(hf_folder), "Qwen/Qwen3-4B", str(called_like_one)):
        with as_hf_folder(model, "latest", None) as found:
            assert found == (model, model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flattened_export_has_the_logits_over_the_temperature(hf_folder, tmp_path, dtype):
    source = tmp_path / "source"
    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=dtype)
    model.save_pretrained(source)
    for file in hf_folder.glob("*token*"):
        shutil.copy(file, source)
    from_hf(str(source), tmp_path / "run")
    text = to_hf(tmp_path / "run", tmp_path / "out", temperature=1.7)
    assert "equal Megatron's within" in text and text.endswith("Its logits are the checkpoint's divided by 1.7.")
    tokens = torch.arange(3, 40)[None]
    flat, old = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(tokens).logits for f in (tmp_path / "out", source)
    )
    assert (flat - old / 1.7).abs().max() <= (2e-2 if dtype == "bfloat16" else 1e-5) * old.abs().max()
    with pytest.raises(ConfigError, match="--temperature must be above 0 and finite, got nan"):
        to_hf(tmp_path / "run", tmp_path / "other", temperature=float("nan"))


def test_the_best_is_taken_where_one_was_kept(run, tmp_path):
    with pytest.raises(ReheatError, match=r"holds no best checkpoint; let the run keep one \(checkpoint\.keep_best\)"):
        to_hf(run, tmp_path / "out", which="best", verify=False)
    (run / "checkpoints" / "step-30").rename(run / "checkpoints" / "step-20")
    (run / "checkpoints" / "best").write_text("step-20")
    assert "step-20 in 1 file" in to_hf(run, tmp_path / "out", which="best", verify=False)


def test_the_reader_joins_chunks_and_refuses_gaps(run):
    reader = CheckpointReader(run / "checkpoints" / "step-30")
    assert not any(name.startswith("optimizer") for name in reader.shapes)
    name = "decoder.layers.mlp.linear_fc2.weight"
    whole = reader.read(name, 0, LAYERS)
    assert torch.equal(reader.read(name, 1, 3), whole[1:3])
    entry = reader._stored[name]
    reader._stored[name] = replace(entry, chunks=[], size=entry.size)
    with pytest.raises(ReheatError, match="in part only"):
        reader.read(name, 0, 1)


def edit_config(folder, target, **changes):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tree = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**tree, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 96}, "linear_fc1.weight is 4 x 160 x 48 instead of 4 x 192 x 48"),
        ({"num_hidden_layers": 6}, "instead of 6 x "),
        ({"tie_word_embeddings": True}, "output_layer.weight in it, which that model does not have"),
        ({"vocab_size": PADDED + 1}, f"embedding.word_embeddings.weight is {PADDED} x 48 instead of {PADDED + 1} x 48"),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": HEAD_DIM},
            "no model.layers.0.self_attn.k_norm.weight in it",
        ),
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
    ],
    ids=str,
)
def test_another_architecture_is_named(run, hf_folder, tmp_path, changes, message):
    other = edit_config(hf_folder, tmp_path / "other", **changes)
    with pytest.raises(ConfigError) as error:
        to_hf(run, tmp_path / "out", hf_source=str(other), verify=False)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_the_exported_folder_stops_where_the_run_did(run, hf_folder, tmp_path):
    kept = edit_config(hf_folder, tmp_path / "kept", _name_or_path="/home/jane/models/llama")
    text = '{"temperature": 0.6, "eos_token_id": [7, 1]}'
    (kept / "generation_config.json").write_text(text)
    to_hf(run, tmp_path / "a", hf_source=str(kept), verify=False)
    assert (tmp_path / "a" / "generation_config.json").read_text() == text
    assert "_name_or_path" not in (tmp_path / "a" / "config.json").read_text()
    assert "| responses end at | &lt;eos&gt; (1), 5 (7) |" in (tmp_path / "a" / "README.md").read_text()
    # without one, transformers would go by config.json alone
    bare = edit_config(hf_folder, tmp_path / "bare", eos_token_id=5)
    (bare / "generation_config.json").unlink()
    to_hf(run, tmp_path / "b", hf_source=str(bare), verify=False)
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == [1, 5]


def test_the_source_of_the_tokenizer_is_checked_like_a_model(run, hf_folder, tmp_path):
    wrong = edit_config(hf_folder, tmp_path / "wrong")
    (wrong / "generation_config.json").write_text('{"eos_token_id": 131}')
    with pytest.raises(ConfigError, match=r"eos_token_id of generation_config.json is 131"):
        to_hf(run, tmp_path / "out", hf_source=str(wrong), verify=False)
    quantised = edit_config(hf_folder, tmp_path / "fp8", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigError, match=r"quantised \(config.json's quantization_config: fp8\)"):
        to_hf(run, tmp_path / "out", hf_source=str(quantised), verify=False)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    victim = max((run / "checkpoints" / "step-30").glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ReheatError, match=rf"{victim.name} is missing or damaged"):
        to_hf(run, tmp_path / "out", verify=False)
    (run / "checkpoints" / "step-30" / "manifest.json").write_text("{")
    with pytest.raises(ReheatError, match=r"manifest.json is damaged"):
        to_hf(run, tmp_path / "out", verify=False)


def test_a_damaged_checkpoint_names_the_newest_whole_one(run, tmp_path):
    checkpoints = run / "checkpoints"
    for name in ("step-9", "step-10", "step-20", "step-20-copy", "step-40"):
        shutil.copytree(checkpoints / "step-30", checkpoints / name)
    (checkpoints / "step-20" / "manifest.json").write_text("{}")
    (checkpoints / "step-40" / "state.json").unlink()
    (checkpoints / "latest").write_text("step-30")
    damages = {
        "manifest.json": (b"{}", b"[]", b"5", b'{"state.json": 0}', b"\xff", b"[" * 100_000, None),
        "state.json": (b"{}", None),
        ".metadata": (b"", None),
    }
    for name, contents in damages.items():
        path = checkpoints / "step-30" / name
        whole = path.read_bytes()
        for content in contents:
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(ReheatError) as refused:
                to_hf(run, tmp_path / "out", verify=False)
            advice = f"; the newest whole checkpoint is {checkpoints / 'step-10'}: to use it, write step-10 into "
            assert f"{advice}{checkpoints / 'latest'} (or give its path to reheat convert)" in str(refused.value)
            assert name in str(refused.value).partition(";")[0]
        path.write_bytes(whole)
    (checkpoints / "latest").write_text("step-10")
    assert "step-10" in to_hf(run, tmp_path / "out", verify=False)


@pytest.mark.parametrize("payload", [name for name in PAYLOADS if name != "inside the objects"])
def test_converting_runs_no_code_of_the_checkpoint(payload, run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as some set it for other programs
    shutil.copytree(run / "checkpoints" / "step-30", run / "checkpoints" / "step-7")
    tamper(run / "checkpoints" / "step-30", payload, tmp_path / "made")
    with pytest.raises(ReheatError) as refused:
        to_hf(run, tmp_path / "out", verify=False)
    assert REASONS[payload] in str(refused.value) and "\n" not in str(refused.value)
    assert f"the newest whole checkpoint is {run / 'checkpoints' / 'step-7'}:" in str(refused.value)
    if "metadata" in payload:
        with pytest.raises(pickle.UnpicklingError, match=r"it names posix\.mkdir"):
            CheckpointReader(run / "checkpoints" / "step-30")
    assert not (tmp_path / "made").exists()


def test_what_is_missing_is_named(run, hf_folder, tmp_path):
    with pytest.raises(ReheatError, match=r"nowhere does not exist; name a checkpoint"):
        to_hf(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ReheatError, match="holds no complete checkpoint"):
        to_hf(tmp_path / "empty", tmp_path / "out")
    gone = edit_config(hf_folder, tmp_path / "gone")
    for path in gone.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        to_hf(run, tmp_path / "out", hf_source=str(gone))
    with pytest.raises(ConfigError, match=r"does not exist.*--hf-source"):
        to_hf(run, tmp_path / "out", hf_source=str(tmp_path / "moved" / "away"))
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config.yaml does not name the model.*--hf-source"):
        to_hf(run, tmp_path / "out")
    (run / "checkpoints" / "step-30" / "state.json").unlink()
    with pytest.raises(ReheatError, match=r"state.json is missing or damaged .*; no earlier checkpoint in"):
        to_hf(run, tmp_path / "out", hf_source=str(hf_folder))


def test_nothing_is_overwritten(run, hf_folder, tmp_path):
    (tmp_path / "out").mkdir()
    for convert in (lambda: to_hf(run, tmp_path / "out"), lambda: from_hf(str(hf_folder), tmp_path / "out")):
        with pytest.raises(ConfigError, match="exists; nothing is overwritten"):
            convert()


def test_from_hf_refuses_what_a_run_would_refuse(hf_folder, tmp_path):
    with pytest.raises(ConfigError, match="'gpt2' is not supported"):
        from_hf(str(edit_config(hf_folder, tmp_path / "gpt2", model_type="gpt2")), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"lacks tensors .*model.layers.4"):
        from_hf(str(edit_config(hf_folder, tmp_path / "deeper", num_hidden_layers=6)), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--shard-gb", "0"], {}, "--shard-gb must be above 0"),
        (["--shard-gb", "nan"], {}, "--shard-gb must be above 0"),
        (["--no-verify", "--verify-vllm"], {}, "exclude each other"),
        ([], {"WORLD_SIZE": "2"}, "start it without torchrun"),
    ],
)
def test_the_command_line_gives_one_line(capsys, monkeypatch, tmp_path, arguments, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["convert", "--to-hf", str(tmp_path / "run"), str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@torch.no_grad()
def test_wrong_weights_fail_the_comparison(hf_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    reference = Reference([[5, 6, 7]], [[8, 9]], [model(torch.tensor([[5, 6, 7, 8]])).logits[0]])
    assert compare_with_transformers(hf_folder, reference) <= 1e-6
    model.model.layers[2].mlp.up_proj.weight[3] += 0.5
    model.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ReheatError, match="logits differ from the checkpoint's by"):
        compare_with_transformers(tmp_path / "wrong", reference)
    model.model.layers[2].mlp.up_proj.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ReheatError, match="by nan"):
        compare_with_transformers(tmp_path / "nan", reference)


def test_an_engine_may_break_ties_otherwise_but_not_differ():
    logits = torch.tensor([[0.0, 5.0, 5.0 - 1e-5], [0.0, 9.0, 0.0]])
    reference = Reference([[0]], [[1, 1]], [logits])
    best = logits.log_softmax(-1)[:, 1].tolist()
    assert _engine_gap([([1, 1], best)], reference) < 1e-6
    assert _engine_gap([([2, 0], [best[0] - 1e-5, -3.0])], reference) < 1e-4  # after a tie the texts are others
    for samples in (([0, 1], best), ([1, 1], [best[0], best[1] - 0.1]), ([1, 1], [best[0], float("nan")])):
        with pytest.raises(ReheatError, match="vLLM's greedy samples"):
            _engine_gap([samples], reference)


def test_the_card_tells_where_the_model_comes_from(run):
    state = json.loads((run / "checkpoints" / "step-30" / "state.json").read_text())
    card = model_card(
        run,
        read_config_tree(run),
        state,
        name="out",
        has_chat_template=False,
        model_type="llama",
        num_parameters=12_345_678,
        dtype="bfloat16",
        verified="Checked.",
    )
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front  # a folder is no name on the Hub
    for line in (
        "# trial, step 30",
        "| policy_version | 29 |",
        "| stage | reheat |",
        "| reheat.teacher_temperature | 1.2 |",
        "| entropy/mean | 0.25 | 30 |",  # not the later step's
        "| eval/pass_at_k | 0.75 | 20 |",
        f"| torch | {version('torch')} |",
    ):
        assert line in card, line
    assert "12.3M parameters in bfloat16" in card and "Checked." in card
    assert yaml.safe_load(card.split("```yaml\n")[1].removesuffix("```\n"))["run"] == {"name": "trial"}


def test_the_card_names_a_base_model_on_the_hub_and_does_without_metrics(run):
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"hf_path": "Qwen/Qwen3-4B-Base"}}))
    card = model_card(
        run,
        read_config_tree(run),
        {},
        name="out",
        has_chat_template=False,
        model_type="qwen3",
        num_parameters=1,
        dtype="float32",
        verified="",
    )
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "Qwen/Qwen3-4B-Base"
    assert "Last metrics" not in card and "Evaluation" not in card


def recipe_of_a_machine(place):
    """A whole recipe whose files all lie in `place`."""
    return dump_config(
        parse_config(
            {
                "model": {"hf_path": f"{place}/models/tiny-llama"},
                "data": {
                    "path": [f"{place}/data/a.jsonl", f"{place}/data/b.jsonl"],
                    "template": "chat",
                    "system_prompt": "/no_think Answer in a word.",
                    "chat_template_kwargs": {"enable_thinking": False},
                    "options": {"data_files": {"train": f"{place}/data/c.parquet"}, "cache": "--at=/home/jane/cache/x"},
                },
                "reward": {"kind": "function", "function": {f"{place}/mine/score.py:score": 1.0}},
                "eval": {"data": {"path": f"{place}/data/held_out.jsonl"}},
                "rl": {"method": f"{place}/mine/method.py:Mine"},
                "run": {"name": "trial", "folder": f"{place}/runs/{{name}}", "fork_from": f"{place}/runs/trunk"},
                "rollout": {"max_tokens": 7},
            }
        )
    )


def test_the_card_names_no_place_of_the_machine_and_its_programs_run(alone, hf_folder, tmp_path, monkeypatch, capsys):
    (alone / "config.yaml").write_text(recipe_of_a_machine("/home/jane doe/private"))
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ enable_thinking }}="
    tokenizer.save_pretrained(alone / "hf")
    seal(alone)
    run = alone.parent.parent
    (run / "metrics.jsonl").write_text(
        '{"step": 20, "eval/avg_at_k": 0.5, "eval/pass_at_k": 0.75, "eval/held/avg_at_k": 0.125, "reward/mean": 0.25}\n'
    )
    to_hf(alone, tmp_path / "tiny-reheated", verify=False)
    card = (tmp_path / "tiny-reheated" / "README.md").read_text()
    for word in ("/home", "jane", "doe", "private", str(tmp_path), str(Path.home())):
        assert word not in card, word
    for line in (
        "tiny-llama, trained with method.py:Mine: a llama model",
        "| base model | tiny-llama |",
        "| run.fork_from | trunk |",
        "| eval/avg_at_k | 0.5 | 20 |",
        "| eval/held/avg_at_k | 0.125 | 20 |",
        "The run's held-out prompts, 8 samples of each at temperature 1.0 and top-p 0.7.",
        "Prompts go through the tokenizer's chat template, as in training.",
    ):
        assert line in card, line
    recipe = yaml.safe_load(card.split("```yaml\n")[1].removesuffix("```\n"))
    assert recipe["data"]["path"] == ["a.jsonl", "b.jsonl"] and recipe["run"]["folder"] == "{name}"
    assert recipe["reward"]["function"] == {"score.py:score": 1.0} and recipe["data"]["options"]["cache"] == "--at=x"
    assert recipe["data"]["system_prompt"] == "/no_think Answer in a word."
    with_transformers, with_vllm = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'name = "tiny-reheated"' in with_transformers and 'LLM(model="tiny-reheated")' in with_vllm
    assert "llm.chat(messages, sampling, chat_template_kwargs={'enable_thinking': False})" in with_vllm
    monkeypatch.chdir(tmp_path)
    exec(with_transformers, {})
    assert capsys.readouterr().out
    compile(with_vllm, "card", "exec")


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ({"template": "raw", "raw_template": "{target}|{numbers}="},
         ['prompt = "{target}|{numbers}=".replace("{target}", "What is 7 * 8?").replace("{numbers}", "...")',
          "Prompts are plain text, as in training; the tokenizer has a chat template, with which it was not trained."]),
        ({"template": "raw"}, ['prompt = "What is 7 * 8?"', "llm.generate([prompt], sampling)"]),
        ({}, ['messages = [{"role": "user", "content": "What is 7 * 8?"}]',
              "Prompts go through the tokenizer's chat template."]),
    ],
    ids=["fields", "raw", "unknown"],
)  # fmt: skip
def test_the_card_prompts_as_the_run_did(data, lines):
    text = usage('a"b', {"data": data}, has_chat_template=True)
    assert all(line in text for line in lines), text
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(program, "card", "exec")
    assert renamed(text, 'a"b', "jane/reheated").count('"jane/reheated"') == 2


def test_of_a_path_its_last_name_stays():
    for given, left in (
        ("/a", "a"), ("~/b/c.jsonl", "c.jsonl"), ("../x/y z", "y z"), ("file:///a/b", "b"), ("x=/a/b,/c/d", "x=b,d"),
        ("https://host/a/b", "https://host/a/b"), ("hf://datasets/a/b", "hf://datasets/a/b"), ("Qwen/Q3", "Qwen/Q3"),
        ("data/train.jsonl", "data/train.jsonl"), ("1/2 and 3/4", "1/2 and 3/4"), ("/", "/"),
    ):  # fmt: skip
        assert without_paths({"key": [given]}) == {"key": [left]}, given
