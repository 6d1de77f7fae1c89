"""A run that is killed while training goes on behind a save that is not complete yet."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from megatron_reheat.checkpoint_folder import latest_checkpoint, list_checkpoints
from megatron_reheat.model.checkpoint import verify_checkpoint
from scripts.faults.random_kills import differences
from tests.e2e import runs

SOURCE = runs.ROOT / "scripts" / "faults" / "slow_disk.c"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_killed_while_a_save_is_in_flight_a_run_goes_on_from_the_one_before_to_the_same_end(tmp_path):
    library = tmp_path / "slow_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    tree = runs.recipe(runs.make_policy_folder(tmp_path / "model"), tmp_path)
    tree["sft"] |= {"steps": 2, "log_every": 1}
    tree |= {"eval": {}, "parallel": {"data": 1, "microbatch_tokens": 512}}
    tree["run"]["steps"] = 3
    tree["checkpoint"] |= {"asynchronous": True}
    recipe = runs.write_recipe(tree, tmp_path / "recipe.yaml")

    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"
    process = runs.start("train", str(recipe), LD_PRELOAD=str(library), SLOW_DISK=".step-2.partial")
    try:
        runs.wait_for(lambda: any(step["step"] == 3 for step in runs.steps_of(folder)), process)
    finally:
        runs.kill(process)
    assert (checkpoints / ".step-2.partial").is_dir()
    assert list_checkpoints(checkpoints) == [checkpoints / "step-1"]
    assert latest_checkpoint(checkpoints) == checkpoints / "step-1"
    assert verify_checkpoint(checkpoints / "step-1") is None
    first, *others = runs.steps_of(folder)
    assert "time/save_s" not in first and all(step["time/save_s"] > 0 for step in others)
    assert [step["step"] for step in others if "time/save_write_s" in step] in ([2], [3])
    runs.train(recipe)
    runs.train(recipe, "run.name=undisturbed", "checkpoint.asynchronous=false")
    assert list(differences(tmp_path / "undisturbed", folder)) == []
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-3", "step-4", "step-5"]
