"""`reheat report`: one figure and one self-contained page about a run, or about several runs as arms."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from megatron_reheat.analysis.tracks import Track, load_tracks
from megatron_reheat.errors import ReheatError
from megatron_reheat.run_folder import Record, RunFolder, write_atomically

EVAL_METRICS = ("eval/avg_at_k", "eval/pass_at_k", "eval/entropy")

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 1180px; margin: 2.5rem auto;
  padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p.note { color: #59636e; margin: 0 0 1.25rem; }
img { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #e4e7ea; vertical-align: top; }
th { font-weight: 600; border-bottom: 2px solid #c9ced3; white-space: nowrap; }
td.number, th.number { text-align: right; }
tr.border td { font-weight: 600; }
tr.plain td { color: #59636e; }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: 13px; line-height: 1.4; }
summary { cursor: pointer; padding: .25rem 0; }
"""


@dataclass(frozen=True)
class ReportPaths:
    png: Path
    html: Path


@dataclass(frozen=True)
class EvalRow:
    """One evaluation. `border` says which stage begins or ends there; empty in the middle of a stage."""

    run: str
    step: int
    stage: str
    border: str
    values: tuple[float | None, ...]


def write_report(run_folders: Sequence[Path], out: Path | None = None) -> ReportPaths:
    """Writes `report.png` and `report.html` (`comparison.*` for several runs) to `out`, or the first run's `report/`.

    Raises:
        ReheatError: a folder has no metrics, or `out` cannot be written; the message names it.
    """
    tracks = load_tracks(run_folders)
    try:
        from megatron_reheat.analysis.plots import draw_report
    except ImportError:
        raise ReheatError("a report needs matplotlib; pip install matplotlib") from None
    png = draw_report(tracks)
    page = _page(tracks, png)
    folder = RunFolder(Path(run_folders[0])).report if out is None else Path(out)
    stem = "report" if len(run_folders) == 1 else "comparison"
    paths = ReportPaths(folder / f"{stem}.png", folder / f"{stem}.html")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(paths.png, png)
        write_atomically(paths.html, page.encode())
    except OSError as error:
        raise ReheatError(f"cannot write the report to {folder}: {error.strerror}; choose another folder") from None
    return paths


def eval_rows(track: Track) -> list[EvalRow]:
    """Evaluations in step order, with the stage border that each one lies on."""
    staged = [r for r in track.records if "stage" in r]
    rows = []
    for i, record in enumerate(staged):
        if not any(name in record for name in EVAL_METRICS):
            continue
        step = record["step"]
        following = next((r for r in staged[i + 1 :] if r["step"] > step), None)
        before = [r for r in (*track.before, *staged[:i]) if "stage" in r and r["step"] < step]
        previous = before[-1] if before else None
        if following is None and track.is_trunk:
            border = "fork"
        elif following is None or _stage(following) != _stage(record):
            border = f"end of {_stage(record)}"
        elif previous is None or _stage(previous) != _stage(record):
            border = f"start of {_stage(record)}"
        else:
            border = ""
        values = tuple(record.get(name) for name in EVAL_METRICS)
        rows.append(EvalRow(track.name, step, _stage(record), border, values))
    return rows


def _stage(record: Record) -> str:
    return f"{record['stage']} round {record['round']}" if record.get("round") else str(record["stage"])


def _page(tracks: Sequence[Track], png: bytes) -> str:
    names = ", ".join(track.name for track in tracks if not track.is_trunk) or tracks[0].name
    last = max(r["step"] for track in tracks for r in track.records)
    image = base64.b64encode(png).decode()
    events = [(track.name, step, text) for track in tracks for step, text in track.events()]
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(names)}</title><style>{CSS}</style></head>',
            f"<body><h1>{escape(names)}</h1>",
            f'<p class="note">Up to step {last}. Entropy in nats, over the response tokens.</p>',
            f'<img alt="Metrics over steps" src="data:image/png;base64,{image}">',
            "<h2>Evaluations</h2>",
            _eval_table(tracks),
            "<h2>Runs</h2>",
            _run_table(tracks),
            "<h2>Events</h2>",
            _table(["run", "step", "event"], events, numeric={1}) if events else "<p>No events.</p>",
            "<h2>Configuration</h2>",
            *(_config_block(track) for track in tracks),
            "</body></html>\n",
        ]
    )


def _eval_table(tracks: Sequence[Track]) -> str:
    rows = [row for track in tracks for row in eval_rows(track)]
    if not rows:
        return "<p>No evaluations were logged (eval.every, eval.data).</p>"
    samples = {track.setting("eval", "num_samples") for track in tracks} - {None}
    k = samples.pop() if len(samples) == 1 else "k"
    header = ["run", "step", "stage", "at", f"avg@{k}", f"pass@{k}", "entropy"]
    cells = [(r.run, r.step, r.stage, r.border, *(_number(v) for v in r.values)) for r in rows]
    return _table(header, cells, numeric={1, 4, 5, 6}, classes=["border" if r.border else "plain" for r in rows])


def _run_table(tracks: Sequence[Track]) -> str:
    header = ["run", "steps", "reheat rounds", "reheat steps", "lowest entropy", "last entropy", "last accuracy"]
    cells = []
    for track in tracks:
        reheats = [span for span in track.spans() if span.stage == "reheat"]
        entropy = _values(track, "entropy/mean")
        accuracy = _values(track, "reward/accuracy")
        steps = [r["step"] for r in track.records if "stage" in r] or [track.records[0]["step"]]
        cells.append(
            (
                track.name,
                f"{steps[0]}-{steps[-1]}",
                len(reheats),
                sum(span.end - span.start for span in reheats),
                _number(min(entropy, default=None)),
                _number(entropy[-1] if entropy else None),
                _number(accuracy[-1] if accuracy else None),
            )
        )
    return _table(header, cells, numeric={1, 2, 3, 4, 5, 6})


def _config_block(track: Track) -> str:
    text = yaml.safe_dump(track.config, sort_keys=False) if track.config else "no config.yaml"
    title = escape(f"{track.name}: {track.folder}")
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"


def _table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], numeric: set[int], classes: Sequence[str] | None = None
) -> str:
    def cell(tag: str, i: int, value: Any) -> str:
        attribute = ' class="number"' if i in numeric else ""
        return f"<{tag}{attribute}>{escape(str(value))}</{tag}>"

    lines = ['<div class="scroll"><table>']
    lines.append(f"<tr>{''.join(cell('th', i, title) for i, title in enumerate(header))}</tr>")
    for number, row in enumerate(rows):
        attribute = f' class="{classes[number]}"' if classes else ""
        lines.append(f"<tr{attribute}>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>")
    lines.append("</table></div>")
    return "\n".join(lines)


def _values(track: Track, metric: str) -> list[float]:
    return [r[metric] for r in track.records if r.get(metric) is not None]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
