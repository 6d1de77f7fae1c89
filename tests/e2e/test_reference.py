"""The reference policy of real runs: after a warm start, from the model's folder and after a fork; killed, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_reheat.errors import ReheatError
from megatron_reheat.recipe import load_config
from megatron_reheat.stages.series import RunSeries
from tests.e2e import runs
from tests.forks import run_ranks

# which layout: two ranks where weights are kept and killed, one process otherwise
ALONE = "parallel.data=1"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reference")
    runs.make_policy_folder(root / "model")
    tree = runs.recipe(root / "model", root)
    tree["rl"] |= {"kl_coef": 0.2, "kl_estimator": "k3+"}
    tree["controller"] = {"action": "none"}
    runs.write_recipe({**tree, "eval": {}}, root / "recipe.yaml")
    return root


def train(root: Path, name: str, *overrides: str) -> list[dict]:
    runs.train(root / "recipe.yaml", f"run.name={name}", *overrides)
    return rl_steps(root / name)


def rl_steps(folder: Path) -> list[dict]:
    return [s for s in runs.steps_of(folder) if s["stage"] == "rlvr"]


def digests(run: Path) -> set[str]:
    states = [json.loads((c / "state.json").read_text()) for c in (run / "checkpoints").glob("step-*")]
    return {state["reference"] for state in states}


def test_killed_after_its_warm_start_a_run_resumes_bit_exactly(root: Path) -> None:
    expected = train(root, "whole", "run.steps=4")
    # the policy is the reference before its first update, and leaves it
    assert expected[0]["policy/kl_to_ref"] == 0 and all(s["policy/kl_to_ref"] > 0 for s in expected[1:])
    process = runs.start("train", str(root / "recipe.yaml"), "run.name=killed", "run.steps=4")
    try:
        runs.wait_for((root / "killed" / "checkpoints" / "step-7" / "manifest.json").exists, process)
    finally:
        runs.kill(process)
    done = len(runs.steps_of(root / "killed"))
    actual = train(root, "killed", "run.steps=4")
    assert done < len(runs.steps_of(root / "whole"))
    assert [runs.numbers_of(s) for s in actual] == [runs.numbers_of(s) for s in expected]
    assert digests(root / "killed") == digests(root / "whole") and len(digests(root / "whole")) == 1
    assert (root / "killed" / "reference" / "config.json").is_file()


def begin_and_go_on(root: Path) -> None:
    """A trunk and its fork, each in two parts; last the fork without the weights that its RL began with."""
    fork = f"run.fork_from={root / 'trunk'}"

    def train(name: str, steps: int, *more: str) -> None:
        overrides = [f"run.name={name}", "sft.steps=0", ALONE, f"run.steps={steps}", *more]
        series.train(load_config(root / "recipe.yaml", overrides))

    with RunSeries(load_config(root / "recipe.yaml", [ALONE])) as series:
        train("trunk", 2)
        train("trunk", 3)
        train("fork", 4, fork)
        train("fork", 5, fork)
        (root / "fork" / "reference").rename(root / "fork" / "elsewhere")
        with pytest.raises(ReheatError) as caught:
            train("fork", 6, fork)
    (root / "refusal.txt").write_text(str(caught.value))


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    run_ranks(begin_and_go_on, root, world_size=1, logs=root, timeout_s=runs.LIMIT_S)
    return root


def test_from_the_models_folder_it_is_read_again_and_a_fork_keeps_its_own(alone: Path) -> None:
    trunk, fork = alone / "trunk", alone / "fork"
    assert [s["policy/kl_to_ref"] > 0 for s in rl_steps(trunk)] == [False, True, True]
    (begun,) = digests(trunk)
    assert begun is not None and not (trunk / "reference").exists()
    # how far the trunk had gone from its reference does not count: the fork begins with its own
    assert [s["policy/kl_to_ref"] > 0 for s in rl_steps(fork)] == [False, True]
    (forked,) = digests(fork)
    assert forked not in (None, begun) and (fork / "elsewhere").is_dir()


def test_without_the_weights_that_it_began_with_a_run_does_not_go_on(alone: Path) -> None:
    message = (alone / "refusal.txt").read_text()
    assert f"{alone / 'model'} does not hold the weights with which this run's RL began" in message
