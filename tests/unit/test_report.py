from __future__ import annotations

import base64
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from megatron_reheat.analysis.plots import DPI, SIZE_INCHES, _draw_entropy, _looks, visible_steps
from megatron_reheat.analysis.report import eval_rows, write_report
from megatron_reheat.analysis.tracks import Span, load_tracks, stage_spans, trailing_mean
from megatron_reheat.errors import ReheatError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def line(step: int, stage: str = "rlvr", round_: int = 0, **metrics: Any) -> dict[str, Any]:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return {"step": step, "stage": stage, "round": round_, "policy_version": step, **named}


def write_run(folder: Path, lines: list[dict[str, Any]], **run: Any) -> Path:
    folder.mkdir(parents=True)
    config = {
        "run": {"name": folder.name, **run},
        "controller": {"collapse_below": 0.08, "reheat_to": 0.12},
        "eval": {"num_samples": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def full_run(folder: Path, **run: Any) -> Path:
    lines = [line(step, "sft", entropy__mean=1.0) for step in (50, 100)]
    for step in range(101, 131):
        stage, round_ = ("reheat", 1) if 111 <= step <= 115 else ("rlvr", int(step > 115))
        metrics: dict[str, Any] = {"entropy__mean": 0.5 / (step - 99), "optimizer__grad_norm": 0.3}
        metrics |= {"rollout__mismatch_kl": 1e-3, "time__rollout_s": 3.0, "time__update_s": 2.0, "time__step_s": 5.0}
        if stage == "rlvr":
            metrics |= {"reward__mean": step / 200, "reward__accuracy": step / 200}
        if step in (110, 115, 120, 130):
            metrics |= {"eval__avg_at_k": step / 200, "eval__pass_at_k": step / 150, "eval__entropy": 0.1}
        lines.append(line(step, stage, round_, **metrics))
    lines.append({"step": 110, "event": "entropy 0.078 < 0.08 nats: entering <reheat> round 1"})
    return write_run(folder, lines, **run)


def read_page(path: Path) -> tuple[str, bytes]:
    """The page without its image, and the image."""
    text = path.read_text()
    (image,) = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    return text.replace(image, ""), base64.b64decode(image)


def png_size(png: bytes) -> tuple[int, int]:
    assert png[:8] == PNG_SIGNATURE
    return struct.unpack(">II", png[16:24])


def test_spans_cover_the_steps_between_records() -> None:
    records = [line(50, "sft"), line(100, "sft"), line(101), {"step": 101, "event": "x"}, line(102)]
    records += [line(103, "reheat", 1), line(104, "reheat", 1), line(105, "rlvr", 1), line(106, "reheat", 2)]
    assert stage_spans(records) == [
        Span("sft", 0, 49, 100),
        Span("rlvr", 0, 100, 102),
        Span("reheat", 1, 102, 104),
        Span("rlvr", 1, 104, 105),
        Span("reheat", 2, 105, 106),
    ]
    assert stage_spans(records[4:5], begin=90) == [Span("rlvr", 0, 90, 102)]
    assert stage_spans([]) == []


def test_trailing_mean_leaves_nulls_out() -> None:
    smoothed = trailing_mean(np.array([1.0, 3.0, np.nan, 5.0]), window=2)
    np.testing.assert_array_equal(smoothed, [1.0, 2.0, np.nan, 5.0])


def test_shared_trunk_is_one_track_and_arms_begin_at_the_fork(tmp_path: Path) -> None:
    trunk = write_run(tmp_path / "trunk", [line(s, entropy__mean=1 / s) for s in range(1, 9)])
    fork = {"fork_from": str(trunk)}
    lines = [{"step": 4, "event": "forked", "fork_step": 4}]
    arms = [
        write_run(tmp_path / name, lines + [line(s, entropy__mean=value) for s in (5, 6)], **fork)
        for name, value in (("hot", 0.3), ("cold", 0.1))
    ]
    tracks = load_tracks([trunk, *arms])
    assert [t.name for t in tracks] == ["trunk (trunk)", "trunk (continued)", "hot", "cold"]
    assert [t.is_trunk for t in tracks] == [True, False, False, False]
    steps = [t.series("entropy/mean")[0].tolist() for t in tracks]
    assert steps == [[1, 2, 3, 4], [4, 5, 6, 7, 8], [4, 5, 6], [4, 5, 6]]  # arms begin where the trunk ends
    assert tracks[2].series("entropy/mean")[1].tolist() == [0.25, 0.3, 0.3]
    assert tracks[2].series("entropy/mean", window=2)[1].tolist() == pytest.approx([(1 / 3 + 1 / 4) / 2, 0.275, 0.3])
    assert tracks[2].spans() == [Span("rlvr", 0, 4, 6)]
    assert [t.name for t in load_tracks([arms[0]])] == ["trunk (trunk)", "hot"]


def test_nulls_are_gaps_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        write_run(folder, [line(1, entropy__mean=0.5), line(2, entropy__mean=None)])
    tracks = load_tracks([*folders, folders[0]])  # the same folder twice is one run
    assert [t.name for t in tracks] == [f"run [{folder}]" for folder in folders]
    values = tracks[0].series("entropy/mean")[1]
    assert values[0] == 0.5 and math.isnan(values[1])


def test_a_long_warm_start_is_cut(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [line(1, "sft"), line(1000, "sft"), line(1001), line(1100)])
    assert visible_steps(load_tracks([run])) == pytest.approx((1000 - 11, 1100 + 0.01 * 111))
    short = write_run(tmp_path / "short", [line(1), line(101)])
    assert visible_steps(load_tracks([short])) == pytest.approx((0, 102.01))


def test_eval_rows_name_the_borders(tmp_path: Path) -> None:
    (track,) = load_tracks([full_run(tmp_path / "run")])
    rows = eval_rows(track)
    assert [(r.step, r.stage, r.border) for r in rows] == [
        (110, "rlvr", "end of rlvr"),
        (115, "reheat round 1", "end of reheat round 1"),
        (120, "rlvr round 1", ""),
        (130, "rlvr round 1", "end of rlvr round 1"),
    ]
    assert rows[0].values == pytest.approx((0.55, 110 / 150, 0.1))


def test_report_is_self_contained(tmp_path: Path) -> None:
    paths = write_report([full_run(tmp_path / "run", name="reheat <b>&</b> $x$")])
    assert paths.png == tmp_path / "run" / "report" / "report.png"
    page, image = read_page(paths.html)
    assert image == paths.png.read_bytes()
    assert png_size(image) == (round(SIZE_INCHES[0] * DPI), round(SIZE_INCHES[1] * DPI))
    assert "http" not in page and "<script" not in page and "<link" not in page and "url(" not in page
    assert "reheat &lt;b&gt;&amp;&lt;/b&gt; $x$" in page and "<b>" not in page
    assert "entering &lt;reheat&gt; round 1" in page
    assert "collapse_below: 0.08" in page
    assert 'avg@4</th><th class="number">pass@4' in page
    assert '<td>end of reheat round 1</td><td class="number">0.5750</td><td class="number">0.7667</td>' in page


def test_several_runs_are_compared_where_asked(tmp_path: Path) -> None:
    folders = [full_run(tmp_path / name) for name in ("one", "two")]
    paths = write_report(folders, tmp_path / "out" / "deep")
    assert paths.html == tmp_path / "out" / "deep" / "comparison.html"
    page, image = read_page(paths.html)
    assert "<h1>one, two</h1>" in page
    assert png_size(image) == png_size(paths.png.read_bytes())
    assert not list(paths.html.parent.glob("*.tmp"))


def test_thresholds_stay_in_view(tmp_path: Path) -> None:
    tracks = load_tracks([write_run(tmp_path / "run", [line(s, entropy__mean=0.5 - 0.01 * s) for s in range(1, 6)])])
    ax = Figure().subplots()
    _draw_entropy(ax, tracks, _looks(tracks))
    low, high = ax.get_ylim()
    assert low < 0.08 and high > 0.5
    assert sorted(text.get_text() for text in ax.texts) == ["collapse below 0.08", "reheat to 0.12"]
    dashed = sorted(drawn.get_ydata()[0] for drawn in ax.lines if drawn.is_dashed())
    assert dashed == [0.08, 0.12]


@pytest.mark.parametrize(
    "lines",
    [
        [line(1)],
        [line(1, entropy__mean=None)],
        [{"step": 3, "event": "started"}],
        [line(1, entropy__mean=0.0, time__rollout_s=0.0), line(2, entropy__mean=0.0)],
        [line(1, rollout__mismatch_kl=-1e-3), line(2, eval__avg_at_k=0.5)],
    ],
    ids=["no metrics", "only null", "only an event", "zeros", "partial"],
)
def test_missing_metrics_do_not_stop_the_report(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    folder = write_run(tmp_path / "run", lines)
    (folder / "config.yaml").unlink()
    paths = write_report([folder])
    assert png_size(paths.png.read_bytes())[0] == round(SIZE_INCHES[0] * DPI)
    assert "no config.yaml" in paths.html.read_text()


def test_problems_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ReheatError, match=f"{tmp_path} holds no metrics.jsonl"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ReheatError, match=f"{tmp_path}/metrics.jsonl is empty"):
        write_report([tmp_path])
    with pytest.raises(ReheatError, match="at least one run folder"):
        write_report([])
    with pytest.raises(ReheatError, match="cannot write the report to"):
        write_report([full_run(tmp_path / "run")], tmp_path / "metrics.jsonl" / "out")
