"""The signatures' table: what counts as reproduced, and that measurements survive their file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from examples.elsewhere import ROOT
from examples.signatures.figure import draw
from examples.signatures.measurements import Measurements, Score, Seed, Settings, first_beyond, own_steps
from examples.signatures.verdicts import Verdict, markdown, signatures


def seed(number: int, **keys: Any) -> Measurements:
    """Everything as the paper has it."""
    wobble = 0.002 * number
    rising = [0.18 + 0.01 * i + wobble for i in range(8)]
    scores = {"0.7": Score(0.6, 0.7, 0.2), "1.0": Score(0.5, 0.7, 0.2)}
    after = {p: replace(s, avg=s.avg + (-1) ** number * 0.005) for p, s in scores.items()}
    made = Measurements(
        seed=number,
        k=8,
        steps=8,
        warm=Score(0.4, 0.8, 0.4),
        collapsed=Score(0.5 + wobble, 0.7 + wobble, 0.2),
        collapse_step=900,
        entropies={"1.2": rising, "1.5": [e + 0.001 for e in rising], "2.0": [e + wobble for e in rising]},
        target_step=5,
        before=scores,
        reheated=after,
        forward_norms=[2.0 + wobble, 2.1],
        reverse_norms=[1.0, 1.1],
        uncollapsed=[0.4, 0.9, 2.0 + wobble],
        guarded=[0.4, 0.9],
        guard_event="entropy ran away",
        guard_rolled_back=True,
        microscope={"overlap": 0.99 - wobble, "kl_ab": 0.002 + wobble / 10},
        cka={"embedding": 1.0, "layer 1": 0.999 - wobble / 10, "layer 2": 0.9, "final norm": 0.8},
        cooling=[0.23, 0.2, 0.17],
        cooled_steps=2,
        cooled_cosine=-0.88 - wobble / 10,
        cooled_left=0.3,
    )
    return replace(made, **keys)


SEEDS = [seed(n) for n in range(3)]


def verdicts(seeds: list[Measurements]) -> dict[str, Verdict]:
    return {s.name[0]: s.verdict for s in signatures(seeds)}


def test_the_papers_figures_reproduce_the_paper() -> None:
    assert verdicts(SEEDS) == dict.fromkeys("abcdefg", Verdict.YES)


def test_two_seeds_say_nothing_about_means() -> None:
    assert verdicts(SEEDS[:2]) == dict.fromkeys("abcdefg", Verdict.OPEN)


@pytest.mark.parametrize(
    ("letter", "change", "verdict"),
    [
        ("a", {"collapsed": Score(0.5, 0.9, 0.2)}, Verdict.PARTLY),
        ("a", {"collapsed": Score(0.3, 0.9, 0.2)}, Verdict.NO),
        ("b", {"target_step": None}, Verdict.PARTLY),
        ("b", {"reheated": {"0.7": Score(0.5, 0.7, 0.2), "1.0": Score(0.4, 0.7, 0.2)}}, Verdict.PARTLY),
        # a loss of five points that the seeds cannot tell from none
        ("b", {"reheated": {"0.7": Score(0.55, 0.7, 0.2), "1.0": Score(0.45, 0.7, 0.2)}}, Verdict.PARTLY),
        ("c", {"entropies": {"1.2": [0.18] * 8, "2.0": [0.3] * 8}}, Verdict.NO),
        ("d", {"forward_norms": [0.5, 0.5]}, Verdict.NO),
        ("e", {"guard_rolled_back": False}, Verdict.PARTLY),
        ("e", {"guard_rolled_back": False, "uncollapsed": [0.4, 0.41]}, Verdict.NO),
        ("f", {"microscope": {"overlap": 0.5, "kl_ab": 0.001}}, Verdict.PARTLY),
        (
            "f",
            {"microscope": {"overlap": 0.5, "kl_ab": 1.0}, "cka": {"embedding": 0.2, "a": 1.0, "b": 1.0}},
            Verdict.NO,
        ),
        ("g", {"cooled_cosine": -0.5}, Verdict.PARTLY),
        ("g", {"cooled_cosine": 0.1}, Verdict.NO),
    ],
)
def test_what_is_otherwise_is_told(letter: str, change: dict[str, Any], verdict: Verdict) -> None:
    assert verdicts([replace(m, **change) for m in SEEDS])[letter] is verdict


def test_a_difference_within_noise_is_partly() -> None:
    changed = [replace(m, forward_norms=[n, 1.0]) for m, n in zip(SEEDS, (0.9, 1.1, 1.2), strict=True)]
    assert verdicts(changed)["d"] is Verdict.PARTLY


def test_measurements_survive_their_file_and_the_table_names_them_all(tmp_path: Path) -> None:
    for m in SEEDS:
        once = Measurements.read(m.write(tmp_path))  # with five digits
        assert once.entropies["1.2"] == pytest.approx(m.entropies["1.2"], rel=1e-4)
        assert Measurements.read(once.write(tmp_path)) == once
    assert max(path.stat().st_size for path in tmp_path.glob("*.json")) < 4000
    lines = markdown(SEEDS).splitlines()
    assert len(lines) == 9 and all(line.count("|") == 5 and line.endswith("reproduced |") for line in lines[2:])
    draw(SEEDS, tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").shape[0] > 500


def test_the_table_that_is_kept_and_shown_is_made_of_the_results_that_are_kept() -> None:
    place = ROOT / "examples" / "signatures"
    table = markdown([Measurements.read(path) for path in sorted((place / "results").glob("seed-*.json"))])
    assert (place / "results" / "table.md").read_text() == table and table in (place / "README.md").read_text()


def test_a_seed_that_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    m = seed(1)
    m.write(tmp_path)
    assert Seed(Settings(tmp_path, tmp_path, False, m.steps), 1).is_done
    assert not Seed(Settings(tmp_path, tmp_path, False, m.steps), 2).is_done
    assert not Seed(Settings(tmp_path, tmp_path, False, m.steps + 1), 1).is_done  # it was another measurement


def test_the_target_is_reached_by_the_updates_before_the_step_that_sees_it() -> None:
    assert first_beyond([0.1, 0.2, 0.3], 0.15) == 1 and first_beyond([0.1], 0.15) is None


def test_a_forks_own_steps_are_its_own(tmp_path: Path) -> None:
    trunk, fork = tmp_path / "trunk", tmp_path / "fork"
    for folder, steps in ((trunk, (1, 2)), (fork, (3,))):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "stage": "rlvr"}}\n' for n in steps))
    (fork / "config.yaml").write_text(f"run:\n  fork_from: {trunk}\n")
    assert [r["step"] for r in own_steps(fork)] == [3] and [r["step"] for r in own_steps(trunk)] == [1, 2]
