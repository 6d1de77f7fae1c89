from __future__ import annotations

import base64
import builtins
import json
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from megatron_reheat.analysis import plots
from megatron_reheat.analysis.evaluations import Estimate, evaluations
from megatron_reheat.analysis.look import DPI, Scene
from megatron_reheat.analysis.panels import PANELS, draw_entropy, draw_evaluation
from megatron_reheat.analysis.plots import PANEL_DPI, PANEL_INCHES, SIZE_INCHES, WIDE_INCHES
from megatron_reheat.analysis.report import write_report
from megatron_reheat.analysis.samples import HEAD_CHARS, MAX_STEPS, TAIL_CHARS, Excerpt, sampled_steps
from megatron_reheat.analysis.tracks import Span, load_tracks, stage_spans, trailing_mean, visible_steps
from megatron_reheat.errors import ReheatError

EVERY_METRIC = (
    *("entropy/mean", "reward/accuracy", "reward/mean", "response/length_mean", "throughput/tokens_per_s"),
    *("rollout/mismatch_kl", "optimizer/grad_norm", "time/rollout_s", "time/unix_s", "time/step_s"),
    *("eval/avg_at_k", "eval/avg_at_k_low", "eval/avg_at_k_high", "eval/pass_at_k", "eval/entropy", "eval/s/avg_at_k"),
)
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
            metrics |= {"eval__avg_at_k_low": (step - 10) / 200, "eval__avg_at_k_high": (step + 10) / 200}
        lines.append(line(step, stage, round_, **metrics))
    lines.append({"step": 110, "event": "entropy 0.078 < 0.08 nats: entering <reheat> round 1"})
    return write_run(folder, lines, **run)


def write_rollouts(folder: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """In the form of `RunFolder.write_rollouts`, whose own test holds what it writes."""
    (folder / "rollouts").mkdir(exist_ok=True)
    text = "".join(json.dumps({"step": step, **row}) + "\n" for row in rows)
    (folder / "rollouts" / f"step-{step:06d}.jsonl").write_text(text)


def answer(response: str, correct: bool | None = True, **row: Any) -> dict[str, Any]:
    graded = {"reward": None if correct is None else float(correct), "correct": correct}
    return {"prompt_index": 1, "prompt": "1+1=", "response": response, "num_tokens": 3, **graded, **row}


def read_page(path: Path) -> str:
    """The page without its pictures' bytes."""
    return re.sub(r"(data:image/png;base64,)[^\"]*", r"\1", path.read_text())


def pictures(path: Path) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'"data:image/png;base64,([^"]*)"', path.read_text())]


def png_size(png: bytes) -> tuple[int, int]:
    assert png[:8] == PNG_SIGNATURE
    return struct.unpack(">II", png[16:24])


def pixels(inches: tuple[float, float], dpi: int) -> tuple[int, int]:
    return int(inches[0] * dpi), int(inches[1] * dpi)


class Page(HTMLParser):
    """Text by the class of the innermost element that has one, rows of cells, and whether every element is closed."""

    VOID = frozenset(("meta", "img", "source"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        name = next((each for _, each in reversed(self.open) if each), "")
        self.texts.setdefault(name, []).append(data.strip())
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[-1][-1] += data


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the page's text: drawing takes seconds."""
    monkeypatch.setattr(plots, "draw_report", lambda tracks: b"")
    monkeypatch.setattr(plots, "draw_panels", lambda tracks: [])


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


def test_evaluations_name_the_borders(tmp_path: Path) -> None:
    (track,) = load_tracks([full_run(tmp_path / "run")])
    rows = evaluations(track)
    assert [(r.step, r.stage, r.border) for r in rows] == [
        (110, "rlvr", "end of rlvr"),
        (115, "reheat round 1", "end of reheat round 1"),
        (120, "rlvr round 1", ""),
        (130, "rlvr round 1", "end of rlvr round 1"),
    ]
    assert (rows[0].avg, rows[0].passed) == (Estimate(0.55, 0.5, 0.6), Estimate(110 / 150, None, None))
    assert (rows[0].suite, rows[0].k, rows[0].entropy, rows[0].response_length) == ("", 4, 0.1, None)


def test_an_evaluation_at_the_fork_is_the_trunks(tmp_path: Path) -> None:
    trunk = write_run(tmp_path / "trunk", [line(s, eval__avg_at_k=s / 10) for s in (1, 2, 3)])
    arm = write_run(tmp_path / "arm", [line(3, eval__avg_at_k=0.4), line(4)], fork_from=str(trunk))
    rows = [row for track in load_tracks([arm]) for row in evaluations(track)]
    assert [(r.run, r.step, r.border) for r in rows] == [
        ("trunk (trunk)", 1, "start of rlvr"), ("trunk (trunk)", 2, "fork in rlvr"), ("arm", 3, ""),
    ]  # fmt: skip


def test_suites_have_rows_of_their_own(tmp_path: Path) -> None:
    """Metrics made up: a suite has its own k where config.yaml says one, and a name may hold anything."""
    suite = {"eval/math-hard/avg_at_k": 0.25, "eval/math-hard/avg_at_k_low": 0.2, "eval/math-hard/avg_at_k_high": 0.3}
    suite |= {"eval/math-hard/pass_at_k": None, "eval/a/<b>/entropy": 0.5}
    lines = [line(1, eval__avg_at_k=0.5, eval__response_length=12.0, **suite), line(2, eval__avg_at_k=0.6)]
    folder = write_run(tmp_path / "run", lines)
    (folder / "config.yaml").write_text("eval: {num_samples: 4, suites: {math-hard: {num_samples: 16}}}")
    (track,) = load_tracks([folder])
    rows = evaluations(track)
    assert [(r.step, r.suite, r.k, r.avg.value) for r in rows] == [
        (1, "", 4, 0.5), (1, "a/<b>", 4, None), (1, "math-hard", 16, 0.25), (2, "", 4, 0.6),
    ]  # fmt: skip
    assert rows[2].avg == Estimate(0.25, 0.2, 0.3) and rows[2].passed == Estimate(None, None, None)

    html = write_report([folder]).html
    table = [row for row in Page(html.read_text()).rows if row[0] in ("run", str(folder.name))][:5]
    assert table[0] == ["run", "step", "stage", "suite", "k", "avg@k", "pass@k", "entropy", "tokens", "elapsed"]
    assert table[1][3:6] == ["eval.data", "4", "0.500 "] and table[1][8] == "12.0"
    assert table[3][3:7] == ["math-hard", "16", "0.250 [0.200, 0.300]", "- "]
    assert len(pictures(html)) == 2 * (len(PANELS) + 2) + 2  # a panel for each suite, the widest drawn twice


def test_intervals_are_drawn_where_they_were_logged(tmp_path: Path) -> None:
    ends = {"eval__avg_at_k_low": 0.4, "eval__avg_at_k_high": 0.7}
    lines = [line(1, eval__avg_at_k=0.5, **ends), line(2, eval__avg_at_k=0.6, eval__avg_at_k_low=None)]
    tracks = load_tracks([write_run(tmp_path / "run", lines)])
    ax = Figure().subplots()
    draw_evaluation(ax, Scene.of(tracks))
    assert ax.get_title() == "Held-out evaluation"
    (bars,) = ax.collections
    assert [segment.tolist() for segment in bars.get_segments()] == [[[1, 0.4], [1, 0.7]]]
    assert ax.get_ylim()[0] < 0.4 and ax.get_ylim()[1] > 0.7


def test_a_suite_stands_for_evaluations_where_eval_data_is_empty(tmp_path: Path) -> None:
    lines = [line(1, **{"eval/hard/avg_at_k": 0.5, "eval/later/avg_at_k": 0.5})]
    ax = Figure().subplots()
    draw_evaluation(ax, Scene.of(load_tracks([write_run(tmp_path / "run", lines)])))
    assert ax.get_title() == "Held-out: hard" and ax.axison


@pytest.mark.usefixtures("undrawn")
def test_elapsed_time_begins_with_the_first_step(tmp_path: Path) -> None:
    lines = [{"step": 0, "event": "started"}]
    lines += [line(1, time__unix_s=1000.0, time__step_s=5.0, time__eval_s=15.0), line(2, time__unix_s=None)]
    lines += [line(3, time__unix_s=8180.0, eval__entropy=1.0), line(4, time__unix_s="noon")]
    folder = write_run(tmp_path / "run", lines)
    (track,) = load_tracks([folder])
    assert track.elapsed_s() == {1: 20.0, 3: 7200.0}
    page = Page(write_report([folder]).html.read_text())
    assert any("2h00 after the start" in " ".join(text.split()) for text in page.texts["note"])
    assert next(row for row in page.rows if row[1] == "3")[-1] == "2h00"
    assert next(row for row in page.rows if row[1] == "1-4")[2] == "2h00"


def test_report_is_self_contained(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run", name="reheat <b>&</b> $x$ \ud800\n")
    write_rollouts(folder, 101, [answer("</pre><script>1</script>\ud800", prompt="<b>")])
    paths = write_report([folder])
    assert paths.png == tmp_path / "run" / "report" / "report.png"
    assert png_size(paths.png.read_bytes()) == pixels(SIZE_INCHES, DPI)
    page = read_page(paths.html)
    assert "http" not in page and "<script" not in page and "<link" not in page and "url(" not in page
    assert "reheat &lt;b&gt;&amp;&lt;/b&gt; $x$" in page and "<b>" not in page
    assert "entering &lt;reheat&gt; round 1" in page
    assert "&lt;/pre&gt;&lt;script&gt;1&lt;/script&gt;\\ud800" in page
    assert "collapse_below: 0.08" in page
    rows = Page(paths.html.read_text()).rows
    assert rows[0][3:5] == ["avg@4", "pass@4"]
    reheated = next(row for row in rows if row[2] == "end of reheat round 1")
    assert reheated[3:6] == ["0.575 [0.525, 0.625]", "0.767 ", "0.1000"]


def test_panels_follow_the_screen_and_its_colours(tmp_path: Path) -> None:
    html = write_report([full_run(tmp_path / "run")]).html
    page = read_page(html)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<picture>") == len(PANELS)
    dark = 'media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,"'
    assert page.count(dark) == len(PANELS)
    found = pictures(html)
    assert {png_size(png) for png in found} == {pixels(PANEL_INCHES, PANEL_DPI), pixels(WIDE_INCHES, PANEL_DPI)}
    assert len(set(found)) == len(found) == 2 * len(PANELS) + 2
    for title in ("Entropy of training rollouts", "Response length", "Throughput", "Step time", "Held-out evaluation"):
        assert f'alt="{title} over steps"' in page
    assert html.stat().st_size < 3e6


def test_several_runs_are_compared_where_asked(tmp_path: Path) -> None:
    folders = [full_run(tmp_path / name) for name in ("one", "two")]
    paths = write_report(folders, tmp_path / "out" / "deep")
    assert paths.html == tmp_path / "out" / "deep" / "comparison.html"
    page = read_page(paths.html)
    assert "<h1>one, two</h1>" in page
    assert {row[0] for row in Page(page).rows} == {"run", "one", "two"}
    assert png_size(paths.png.read_bytes()) == pixels(SIZE_INCHES, DPI)
    assert not list(paths.html.parent.glob("*.tmp"))


def test_answers_are_of_the_ends_and_the_stage_borders(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run")
    for step in range(102, 131, 2):  # two of three steps of a border have none
        write_rollouts(folder, step, [answer("2")])
    write_rollouts(folder, 900, [answer("of a step that was set aside")])
    (track,) = load_tracks([folder])
    assert [(s.step, s.stage, s.place) for s in sampled_steps(track)] == [
        (102, "rlvr", "first"),
        (110, "rlvr", "end of rlvr"),
        (112, "reheat round 1", "start of reheat round 1"),
        (114, "reheat round 1", "end of reheat round 1"),
        (116, "rlvr round 1", "start of rlvr round 1"),
        (130, "rlvr round 1", "last"),
    ]

    many = write_run(tmp_path / "many", [line(s, "reheat" if s % 2 else "rlvr", s) for s in range(1, 100)])
    for step in range(1, 100):
        write_rollouts(many, step, [answer("2")])
    steps = [s.step for s in sampled_steps(load_tracks([many])[0])]
    assert len(steps) == MAX_STEPS and steps[0] == 1 and steps[-1] == 99


@pytest.mark.usefixtures("undrawn")
def test_answers_are_shown_with_their_verdicts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(1), line(2, "reheat", 1)])
    long = "a" * HEAD_CHARS + "b" * 1234 + "c" * TAIL_CHARS
    rows = [
        answer("\n 2", reward=0.75, reward_parts={"form <i>": 0.25, "none": None}),
        answer(long, correct=False, finish_reason="length", timed_out=True),
        answer("another prompt", prompt_index=2, prompt=7),
        answer("a third one", prompt_index=3),
    ]
    write_rollouts(folder, 1, rows)
    write_rollouts(folder, 2, [answer("ungraded", correct=None)])
    file = folder / "rollouts" / "step-000001.jsonl"
    file.write_text("[]\n" + file.read_text())
    page = Page(write_report([folder]).html.read_text())
    assert page.texts["right"] == ["right", "right"] and page.texts["wrong"] == ["wrong"]
    assert page.texts["ungraded"] == ["not graded"]
    assert page.texts["cut"] == ["[… 1,234 characters are left out here …]"]
    notes = page.texts["note"]
    assert "reward 0.75, form <i> 0.25, 3 tokens" in notes
    assert "reward 0, grading timed out, 3 tokens, cut off at the longest length allowed" in notes
    assert f"1 of the lines read could not be understood. All that were kept: {file}" in notes
    html = read_page(folder / "report" / "report.html")
    assert "<pre>\n\n 2</pre>" in html  # a browser drops the first line break
    assert "another prompt" in html and "a third one" not in html
    assert Excerpt.of(long) == Excerpt("a" * HEAD_CHARS, 1234, "c" * TAIL_CHARS)


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_answers_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(1)])
    (folder / "rollouts" / "step-000001.jsonl").mkdir(parents=True)  # not to be read
    bare = write_run(tmp_path / "bare", [line(1)])
    page = " ".join(read_page(write_report([folder, bare]).html).split())
    assert "1 of the lines read could not be understood" in page
    assert f"bare kept no answers in {bare}/rollouts (logging.rollouts_per_step)." in page


def test_thresholds_stay_in_view(tmp_path: Path) -> None:
    tracks = load_tracks([write_run(tmp_path / "run", [line(s, entropy__mean=0.5 - 0.01 * s) for s in range(1, 6)])])
    ax = Figure().subplots()
    draw_entropy(ax, Scene.of(tracks))
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
        [line(s, **dict.fromkeys(EVERY_METRIC, value)) for s, value in enumerate((None, "x", 1e400, 10**400, 1.0))],
    ],
    ids=["no metrics", "only null", "only an event", "zeros", "partial", "no numbers"],
)
def test_missing_metrics_do_not_stop_the_report(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    folder = write_run(tmp_path / "run", lines)
    (folder / "config.yaml").unlink()
    paths = write_report([folder])
    assert png_size(paths.png.read_bytes())[0] == round(SIZE_INCHES[0] * DPI)
    Page(paths.html.read_text())
    assert "no config.yaml" in read_page(paths.html)


@pytest.mark.parametrize(
    "config", ["eval: 3\ncontroller: [1]\n", "controller: {collapse_below: low}\n", "eval: {suites: 1}"]
)
def test_settings_of_another_form_are_left_out(tmp_path: Path, config: str) -> None:
    folder = write_run(
        tmp_path / "run", [line(1, entropy__mean=1.0, eval__avg_at_k=0.5), line(2, **{"eval/s/entropy": 1})]
    )
    (folder / "config.yaml").write_text(config)
    tracks = load_tracks([folder])
    ax = Figure().subplots()
    draw_entropy(ax, Scene.of(tracks))
    assert not ax.texts and [row.k for row in evaluations(tracks[0])] == [None, None]


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(name, name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ReheatError, match=rf"^a report needs {missing}; pip install 'megatron-reheat\[report\]'$"):
        write_report([full_run(tmp_path / "run")])


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
