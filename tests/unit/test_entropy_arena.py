"""The entropy arena: what it reads off a run, and the table and figure it makes of recorded results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from examples.elsewhere import moved
from examples.entropy_arena.arena import Contest, Settings, WarmStart
from examples.entropy_arena.recipes import CONTESTANTS, RECIPES
from examples.entropy_arena.results import Result, draw, effect_of_reheating, markdown, measured, read_all, rows
from megatron_reheat.recipe import load_config


def result(method: str, seed: int, avg: float, *, reheat: bool = False, **keys: Any) -> Result:
    numbers = {"pass_": avg + 0.2, "entropy": 0.25, "tokens": 2e6, "seconds": 100.0 + seed, "gradient_norm": 0.5}
    return Result(method, reheat, seed, 300, 8, avg=avg, **{**numbers, "curve": (0.3, 0.2), **keys})


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    for seed, (grpo, reheated, rlrt) in enumerate([(0.50, 0.52, 0.56), (0.52, 0.51, 0.60), (0.54, 0.56, 0.61)]):
        result("grpo", seed, grpo).write(tmp_path)
        result("grpo", seed, reheated, reheat=True, rounds=seed).write(tmp_path)
        result("avspo", seed, rlrt).write(tmp_path)
    Result("zeta", False, 0, 300, error="ReheatError: no").write(tmp_path)
    return tmp_path


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    one, failed = result("grpo", 1, 0.5, reheat=True), Result("rlrt", False, 2, 300, error="ReheatError: no")
    for r in (one, failed):
        r.write(tmp_path)
    assert one.file == "seed-1/grpo-reheat.json" and failed.file == "seed-2/rlrt.json"
    assert not any("NaN" in path.read_text() for path in tmp_path.rglob("*.json"))  # which is no JSON
    read = read_all(tmp_path)
    assert read[0] == one
    assert read[1].error == "ReheatError: no" and math.isnan(read[1].avg) and read[1].curve == ()
    assert max(path.stat().st_size for path in tmp_path.rglob("*.json")) < 400


def test_rows_are_methods_with_and_without_reheating_and_grpo_is_first(recorded: Path) -> None:
    table = rows(read_all(recorded))
    assert [r.label for r in table] == ["grpo", "grpo + reheating", "avspo", "zeta"]
    assert [(r.seeds, r.failed) for r in table] == [(3, 0), (3, 0), (3, 0), (0, 1)]
    assert [r.rounds for r in table] == [0, 1, 0, 0]


def test_the_effect_of_reheating_is_over_seeds_and_not_over_runs(recorded: Path) -> None:
    for seed, (plain, reheated) in enumerate([(0.5, 0.5), (0.5, 0.54), (0.5, 0.5)]):
        result("avspo", seed, plain).write(recorded)
        result("avspo", seed, reheated, reheat=True, rounds=1).write(recorded)
    text = effect_of_reheating(read_all(recorded))
    # grpo's of seed 0 had no round; by seed: avspo's 0, the mean of -0.01 and 0.04, the mean of 0.02 and 0
    assert text.startswith("Reheating against none, 5 pairs of runs, 3 seeds: avg@8 +0.008 ± 0.019, pass@8 +0.008")
    assert effect_of_reheating([result("grpo", 0, 0.5)]) == ""


def test_differences_are_paired_by_seed(recorded: Path) -> None:
    against = {r.label: r.against for r in rows(read_all(recorded))}
    assert against["grpo"] is None and against["zeta"] is None
    # 0.06, 0.08, 0.07: far narrower than the two intervals by themselves
    assert against["avspo"] == pytest.approx((0.07, 4.303 * 0.01 / math.sqrt(3)))
    (recorded / "seed-1" / "grpo.json").unlink()
    assert {r.label: r.against for r in rows(read_all(recorded))}["avspo"].value == pytest.approx(0.065)


def test_the_table(recorded: Path) -> None:
    lines = markdown(read_all(recorded)).splitlines()
    assert lines[0] == (
        "| method | seeds | rounds | entropy (nats) | avg@8 | pass@8 | tokens (M) | seconds | gradient norm | avg@8 - GRPO's |"
    )
    assert lines[2] == (
        "| grpo | 3 | - | 0.250 ± 0.000 | 0.520 ± 0.050 | 0.720 ± 0.050 | 2.00 ± 0.00 | 101 ± 2 | 0.500 ± 0.000 | - |"
    )
    assert lines[3].startswith("| grpo + reheating | 3 | 1.0 |")
    assert lines[5] == "| zeta | 0 (1 failed) | - | - | - | - | - | - | - | - |"
    assert {line.count("|") for line in lines} == {11}


def test_the_figure_shows_every_method_that_has_a_result(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "arena.png"
    draw(read_all(recorded), path)
    image = matplotlib.image.imread(path)
    assert image.shape[1] == 13 * 140 and image[..., :3].std() > 0.02


def test_what_is_read_off_a_run() -> None:
    def step(number: int, stage: str, **more: float) -> dict[str, Any]:
        names = {"entropy/mean": 0.1 * number, "time/step_s": 0.5, "throughput/tokens_per_s": 100.0}
        return {"step": number, "stage": stage, "round": int(stage == "reheat"), **names, **more}

    run = [step(k, "rlvr", **{"optimizer/grad_norm": float(k)}) for k in (1, 2)]
    run += [step(3, "reheat"), step(4, "reheat"), step(5, "rlvr", **{"optimizer/grad_norm": 9.0})]
    run[3] |= {"eval/avg_at_k": 0.1, "eval/pass_at_k": 0.2, "eval/entropy": 0.3}
    run[4] |= {"eval/avg_at_k": 0.4, "eval/pass_at_k": 0.5, "eval/entropy": 0.6}
    del run[3]["throughput/tokens_per_s"]  # it only measured
    made = measured(run, Result("grpo", True, 0, 5, 8))
    assert (made.avg, made.pass_, made.entropy, made.rounds) == (0.4, 0.5, 0.6, 1)
    assert (made.tokens, made.seconds, made.gradient_norm) == (200.0, 2.5, 2.0)
    assert made.curve == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5))


def test_a_long_run_has_a_short_curve() -> None:
    run = [{"step": k, "stage": "rlvr", "entropy/mean": float(k), "optimizer/grad_norm": 1.0} for k in range(300)]
    run[-1] |= {"eval/avg_at_k": 0.4, "eval/pass_at_k": 0.5, "eval/entropy": 0.6}
    assert measured(run, Result("grpo", False, 0, 300, 8)).curve == tuple(10 * k + 4.5 for k in range(30))


def test_a_recipe_reads_and_writes_in_one_place(tmp_path: Path) -> None:
    for name in RECIPES:
        config = moved(RECIPES[name], tmp_path)
        text = config.model_dump_json()
        assert "runs/countdown" not in text and f"{tmp_path}/model" in text
        assert config.rl == load_config(RECIPES[name]).rl or f"{tmp_path}/" in config.rl.model_dump_json()


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("quick", [False, True])
def test_contests_differ_in_the_method_and_the_reheating_alone(name: str, quick: bool, tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path / "results", 7, quick)
    plain, reheated = (Contest(settings, name, reheat, 2).config for reheat in (False, True))
    start = WarmStart(settings, 2).config
    assert start.total_steps == start.sft.steps > 0
    assert plain.run.fork_from == str(start.run.path) == str(tmp_path / "seed-2" / "trunk")
    assert plain.total_steps == start.total_steps + 7 and {plain.run.seed, start.run.seed} == {2}
    assert (plain.controller.action, reheated.controller.action) == ("none", "reheat")
    same = {"run": reheated.run, "controller": reheated.controller}
    assert plain.model_copy(update=same) == reheated
    baseline = Contest(settings, "grpo", False, 2).config
    differing = [key for key in type(plain).model_fields if getattr(plain, key) != getattr(baseline, key)]
    assert set(differing) <= {"run", "rl", "data"}
    assert (plain.rl.prompts_per_step, plain.rl.group_size) == (baseline.rl.prompts_per_step, baseline.rl.group_size)


def test_what_is_done_is_told_by_its_file(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, 300, False)
    contest = Contest(settings, "grpo", False, 0)
    assert not contest.is_done
    result("grpo", 0, 0.5).write(tmp_path)
    assert contest.is_done and not Contest(settings, "grpo", True, 0).is_done
    with pytest.raises(SystemExit, match="of 300 steps, not 7; give other --results"):
        _ = Contest(Settings(tmp_path, tmp_path, 7, False), "grpo", False, 0).is_done
    Result("grpo", False, 0, 300, error="ReheatError: no").write(tmp_path)
    assert not contest.is_done
