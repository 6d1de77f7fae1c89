"""Hugging Face folder -> checkpoint -> training under every layout -> Hugging Face folder, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.countdown_cpu.make_model import make_tokenizer
from megatron_reheat.model.hf_reader import HFReader
from tests.distributed.launch import launch
from tests.tiny_models import save_tiny_model

# name: family, dtype of the folder, layout; the vocabulary is padded wherever tensor is 2
RUNS = {
    "tp2": ("qwen2", "float32", {"tensor": 2}),
    "pp2": ("qwen3_tied", "float32", {"pipeline": 2}),
    "dp4_from_bf16": ("llama", "bfloat16", {"data": 4}),
    "tp2pp2": ("qwen3_untied", "float32", {"tensor": 2, "pipeline": 2}),
    "pp2vpp2": ("qwen3_tied", "float32", {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2_bf16_whole_optimizer": (
        "qwen3_untied",
        "bfloat16",
        {"tensor": 2, "dtype": "bfloat16", "distributed_optimizer": False},
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> paths and layout of a converted run."""
    root = tmp_path_factory.mktemp("convert")
    runs = {}
    for name, (family, dtype, layout) in RUNS.items():
        folder = root / f"{family}-{dtype}"
        if not folder.exists():
            save_tiny_model(family, folder)
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        paths = {key: root / f"{name}-{key}" for key in ("start", "run", "round_trip", "out")}
        runs[name] = {"folder": folder, "layout": layout, **paths}
    everything = list(runs.values())
    ranks = launch("converted_runs", 4, root, runs=everything)
    for index, run in enumerate(everything):
        run["started_exact"] = [rank["started_exact"][index] for rank in ranks]
        run["message"] = ranks[0]["messages"][index]
    return runs


@pytest.mark.parametrize("name", RUNS)
def test_every_layout_starts_from_a_converted_folder(runs, name):
    assert all(runs[name]["started_exact"])


@pytest.mark.parametrize("name", RUNS)
def test_there_and_back_is_bit_exact(runs, name):
    original, back = HFReader(runs[name]["folder"]), HFReader(runs[name]["round_trip"])
    assert back.names() == original.names()
    for tensor in original.names():
        assert torch.equal(back.get(tensor), original.get(tensor)), tensor
        assert back.get(tensor).dtype == original.get(tensor).dtype
    read = [json.loads((runs[name][key] / "config.json").read_text()) for key in ("folder", "round_trip")]
    assert read[0] == read[1]


@pytest.mark.parametrize("name", RUNS)
def test_a_trained_checkpoint_converts_to_what_the_engine_exports(runs, name):
    run = runs[name]
    exported = torch.load(run["run"] / "exported.pt")
    original, converted = HFReader(run["folder"]), HFReader(run["out"])
    assert converted.names() == exported.keys()
    for tensor, expected in exported.items():
        assert torch.equal(converted.get(tensor), expected), tensor
        assert converted.get(tensor).dtype == expected.dtype
    changed = [n for n in exported if not torch.equal(original.get(n), exported[n])]
    assert len(changed) > len(exported) / 2  # the step moved them


@pytest.mark.parametrize("name", RUNS)
def test_the_folder_is_complete(runs, name):
    out = runs[name]["out"]
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {p.name for p in shards}
    dtype = runs[name]["layout"].get("dtype", "float32")
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert (out / "generation_config.json").is_file()
    # not the tokenizer that was saved: transformers' class for Qwen2 adds a token to it
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(runs[name]["folder"]))
    assert not list(out.parent.glob(".*.partial"))
    card = (out / "README.md").read_text()
    assert "step 1" in card and "Verified" in card and dtype in card


@pytest.mark.parametrize("name", RUNS)
def test_the_conversion_verified_its_logits(runs, name):
    assert "transformers' logits of 3 prompts equal Megatron's" in runs[name]["message"]
