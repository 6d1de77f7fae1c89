"""Every registered method, trained for real with the recipe that ships: RL, a reheating, RL again, and a restart.

They take turns on one vLLM engine in one process (`train_all`), so that a method costs seconds.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.entropy_arena.recipes import RECIPES
from megatron_reheat.cli import main
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.grpo import GRPO, Costs
from megatron_reheat.run_folder import RunFolder
from tests.e2e import method_recipes, runs
from tests.e2e.method_recipes import STAGES
from tests.e2e.train_all import KILLED_AT

GUIDE = runs.ROOT / ".github" / "CONTRIBUTING.md"
each_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    method_recipes.make_inputs(root)
    return root


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    (out := root / "runs").mkdir()
    for name in RECIPES:
        method_recipes.small(name, root, out)
    command = [sys.executable, "-W", "ignore", "-m", "tests.e2e.train_all", str(out)]
    result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=3 * runs.LIMIT_S)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return out


def result_of(name: str, trained: Path) -> dict[str, Any]:
    error = trained / f"{name}.error"
    assert not error.exists(), error.read_text()
    return json.loads((trained / f"{name}.json").read_text())


def steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "stage" in line]


def test_every_method_has_a_recipe() -> None:
    assert method_recipes.methods_without_recipe() == set()


@each_recipe
def test_a_method_trains_and_can_be_reheated(name: str, trained: Path) -> None:
    result = result_of(name, trained)
    done = steps(result["lines"])
    assert [s["stage"] for s in done] == STAGES
    assert [s["policy_version"] for s in done] == [
        1,
        2,
        3,
        3,
        4,
    ]  # the last reheating step measures and changes nothing
    assert 1e-4 < result["moved"] < 0.1
    for s in done:
        assert None not in s.values() and "log/nonfinite" not in s
        assert s["rollout/mismatch_kl"] < 1e-6 and 0 < s["entropy/mean"] < math.log(22)
        if s["stage"] == "rlvr":
            assert 0 < s["reward/accuracy"] < 1
            assert s["optimizer/grad_norm"] > 0 and s["optimizer/skipped_updates"] == 0
    assert all(s["reheat/kl"] > 0 for s in done if s["stage"] == "reheat")


@each_recipe
def test_its_own_metrics_are_there_and_tell_something(name: str, trained: Path) -> None:
    method = method_recipes.load(name).rl.method
    rl = [s for s in steps(result_of(name, trained)["lines"]) if s["stage"] == "rlvr"]
    own = [{key: value for key, value in s.items() if key.startswith(f"{method}/")} for s in rl]
    if method == "grpo":
        assert not any(own) and all(s["policy/ratio"] == pytest.approx(1) for s in rl)
    else:
        assert all(own[1:]) and any(value for o in own for value in o.values())  # scope begins with the second step


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "grpo"])
def test_it_does_not_train_as_grpo_does(name: str, trained: Path) -> None:
    """The first step's samples are the same where the policy samples them all; then the two go their own ways."""
    own, grpo = ([s["entropy/mean"] for s in steps(result_of(n, trained)["lines"])] for n in (name, "grpo"))
    assert choose_method(method_recipes.load(name)).cls.samplers or own[0] == grpo[0]
    assert own[-1] != grpo[-1]


@each_recipe
def test_only_the_policys_own_samples_are_measured(name: str, trained: Path) -> None:
    """The sampler and the temperature of each response say which these are."""
    config = method_recipes.load(name)
    result = result_of(name, trained)
    rl = [s for s in steps(result["lines"]) if s["stage"] == "rlvr"]
    assert len(result["seen"]) == len(rl) and any(seen["own"] for seen in result["seen"])
    for s, seen in zip(rl, result["seen"], strict=True):
        if seen["own"]:
            assert s["entropy/trained"] == pytest.approx(seen["entropy"], rel=1e-6)
        else:
            assert "entropy/trained" not in s
    samples_more = choose_method(config).cls.collect is not GRPO.collect
    assert any(seen["others"] for seen in result["seen"]) == samples_more


@each_recipe
def test_a_teacher_is_shown_what_its_prompt_has_room_for(name: str, trained: Path) -> None:
    """`data.max_hinted_prompt_tokens`: some solutions have just so many, and others more, which are passed over."""
    hints, limit = result_of(name, trained)["hints"], method_recipes.MAX_HINTED.get(name)
    assert (limit is None) == (method_recipes.load(name).data.hint_template is None)
    if limit is None:
        assert not hints
    else:
        assert None in hints and max(length for length in hints if length is not None) == limit


@each_recipe
def test_what_it_costs_is_what_it_says(name: str, trained: Path) -> None:
    """`reheat check` estimates from this: a method that trains on more sequences than GRPO declares them."""
    result = result_of(name, trained)
    costs = Costs(**result["costs"])
    base = method_recipes.SIZES["rl"]["prompts_per_step"] * method_recipes.SIZES["rl"]["group_size"]
    assert any(seen["own"] + seen["others"] > base for seen in result["seen"]) == (costs.trained > 0)


@each_recipe
def test_a_restart_changes_nothing(name: str, trained: Path) -> None:
    whole = [runs.numbers_of(s) for s in steps(result_of(name, trained)["lines"])]
    folder = trained / name
    discarded = [json.loads(line) for line in (folder / "metrics.discarded.jsonl").read_text().splitlines()]
    assert [runs.numbers_of(s) for s in steps(discarded)] == whole[KILLED_AT:]
    assert [runs.numbers_of(s) for s in runs.steps_of(folder)] == whole


# -- a method of the user's own ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(root: Path) -> Path:
    """The one of the guide, as it stands there."""
    (code,) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    path = root / "toy" / "brief.py"
    path.parent.mkdir()
    path.write_text(code)
    return path


def test_its_options_are_refused_from_the_command_line_as_any_other(
    toy: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = method_recipes.small("grpo", root, toy.parent)
    assert main(["check", str(recipe), f"rl.method={toy}:Brief", "rl.options.bonsu=1", "--gpu", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "rl.options.bonsu: unknown key; did you mean 'bonus'?" in error and error.count("\n") == 1


def test_a_method_of_the_users_own_trains_on_several_ranks_and_goes_on(toy: Path, root: Path) -> None:
    """From the command line, by a relative path; its file has moved when the run goes on."""
    more = {"parallel": {"data": 2}, "logging": {"rollouts_per_step": 8}}
    recipe = method_recipes.small("grpo", root, toy.parent, **more)
    folder = toy.parent / "grpo"

    def train(method: Path, steps: int) -> list[dict[str, Any]]:
        options = [
            f"rl.method={os.path.relpath(method, runs.ROOT)}:Brief",
            "rl.options.bonus=0.3",
            f"run.steps={steps}",
        ]
        runs.train(recipe, *options)
        assert f"method: {method.resolve()}:Brief" in (folder / "config.yaml").read_text()
        return runs.steps_of(folder)

    first = train(toy, KILLED_AT)
    moved = toy.rename(folder / "brief.py")
    done = train(moved, len(STAGES))
    assert done[:KILLED_AT] == first and [s["stage"] for s in done] == STAGES
    usual = 8.0  # rollout.max_tokens
    for s in done:
        assert s["rollout/mismatch_kl"] < 1e-6 and 0 < s["entropy/mean"] < math.log(22)
        if s["stage"] == "rlvr":
            rows = [json.loads(line) for line in RunFolder(folder).rollouts(s["step"]).read_text().splitlines()]
            right = [row["num_tokens"] for row in rows if row["correct"]]
            assert len(rows) == 32 and right and s["optimizer/grad_norm"] > 0
            usual += 0.2 * (sum(right) / len(right) - usual)
            assert s["brief/usual_length"] == pytest.approx(usual, rel=1e-12)
