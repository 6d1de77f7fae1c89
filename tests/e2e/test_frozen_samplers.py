"""Whole runs that sample from a frozen model beside the policy: in turns with the trainer, from servers, and offline."""

from __future__ import annotations

import json
import os
import re
import signal

import psutil
import pytest
from transformers import AutoModelForCausalLM

from megatron_reheat.config_data import DataConfig
from megatron_reheat.data.sources import read_records
from tests.e2e import runs

STEPS = 5
ONE_RANK = ["parallel.data=1", "eval.data=", "controller.action=none", f"run.steps={STEPS}", "sft.steps=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The explorer has other weights, another dtype and several files."""
    root = tmp_path_factory.mktemp("train")
    tree = runs.recipe(runs.make_policy_folder(root / "model"), root)
    explorer = runs.make_policy_folder(root / "explorer")
    model = AutoModelForCausalLM.from_pretrained(explorer, dtype="bfloat16")
    (explorer / "model.safetensors").unlink()
    model.save_pretrained(explorer, max_shard_size="40KB")
    assert len(list(explorer.glob("model-*.safetensors"))) > 1
    options = {"mix_steps": STEPS, "temperature": 1.0, "top_p": 0.9}
    rl = {**tree["rl"], "method": "s2l_po", "samplers": {"explorer": str(explorer)}, "options": options}
    rl |= {"dynamic_sampling": True, "max_generation_batches": 2}
    runs.write_recipe({**tree, "rl": rl}, root / "s2l_po.yaml")
    runs.write_recipe(tree, root / "recipe.yaml")
    return root


@pytest.fixture(scope="module")
def colocated(root):
    """The steps and the log of a run whose explorer was killed after its first step."""
    process = runs.start("train", str(root / "s2l_po.yaml"), "run.name=colocated", "rollout.mode=colocated", *ONE_RANK)
    try:
        runs.wait_for(lambda: len(trained(root / "colocated")) > 0, process)
        log = (root / "colocated" / "logs" / "vllm-explorer-0.log").read_text()
        (pid,) = set(re.findall(r"pid=(\d+)", log))
        assert int(pid) in {child.pid for child in psutil.Process(process.pid).children()}
        os.kill(int(pid), signal.SIGKILL)
        output, errors = process.communicate(timeout=runs.LIMIT_S)
    finally:
        if process.poll() is None:
            runs.kill(process)
    assert process.returncode == 0, errors[-3000:]
    return trained(root / "colocated"), output


def test_an_explorer_takes_turns_and_outlives_its_death(colocated):
    steps, output = colocated
    assert "explorer in bfloat16, frozen" in output and output.count("digests verified") == 2
    assert [s["step"] for s in steps] == [3, 4, 5, 6, 7]  # behind the warm start
    assert [s["s2l_po/explorer_share"] for s in steps] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert (steps[0]["rollout/engine_restarts"], steps[-1]["rollout/engine_restarts"]) == (0.0, 1.0)
    assert all(s["rollout/mismatch_kl"] < 1e-6 for s in steps)
    # its own weights, from which the policy's have moved away in the warm start
    assert all(0 < s["s2l_po/logprob_gap"] < 5 for s in steps[:-1])
    assert any(s["s2l_po/explorer_accuracy"] > 0 for s in steps[:-1])


def test_servers_of_its_own_sample_the_same(root, colocated):
    arguments = ["run.name=servers", "rollout.mode=server", *ONE_RANK]
    assert "digests verified" in runs.train(root / "s2l_po.yaml", *arguments)
    steps, (expected, _) = trained(root / "servers"), colocated
    for ours, theirs in zip(steps, expected, strict=True):
        same = {
            name: value
            for name, value in runs.numbers_of(theirs).items()
            if isinstance(value, float) and not name.startswith(("rollout/mismatch", "rollout/engine"))
        }
        assert ours["step"] == theirs["step"] and len(same) > 15
        assert {name: ours[name] for name in same} == pytest.approx(same, rel=1e-4)


def test_teachers_of_before_take_their_place_in_the_groups(root):
    """Worked answers of every other problem, and a text encoder in the place of n-grams."""
    tree = json.loads(json.dumps(runs.recipe(root / "model", root)))
    teachers = root / "teachers.jsonl"
    entries = list(read_records(DataConfig(**tree["data"])))[::2]
    lines = [{"id": e["metadata"]["source_index"], "texts": [e["metadata"]["expression"], "1+1"]} for e in entries]
    teachers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    joined = {"path": str(teachers), "key": "id", "prompt_key": "metadata.source_index", "texts_key": "texts"}
    tree["rl"] |= {"method": "oger", "options": {"teachers": joined, "encoder": str(root / "explorer")}}
    recipe = runs.write_recipe(tree, root / "oger.yaml")
    arguments = [a for a in ONE_RANK if not a.startswith("parallel")]  # two replicas, which share the encoding
    output = runs.train(recipe, "run.name=oger", *arguments)
    assert "oger: 60 trajectories for 30 of 60 prompts" in output
    steps = trained(root / "oger")
    assert len(steps) == STEPS
    for step in steps:
        assert 0 < step["oger/covered_fraction"] < 1 and 0 < step["oger/distance"] < 1
        assert 0 <= step["oger/bonus"] < 1 and step["rollout/mismatch_kl"] < 1e-6
    assert {s["oger/teacher_accuracy"] for s in steps} - {0.0}


def trained(folder):
    return [s for s in runs.steps_of(folder) if s["stage"] != "sft"]
