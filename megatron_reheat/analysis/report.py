"""`reheat report`: one figure and one self-contained page about a run, or about several runs as arms.

What the page says is prepared here, how it looks stands in `report.html.j2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_reheat.analysis import samples
from megatron_reheat.analysis.evaluations import Estimate, Evaluation, evaluations
from megatron_reheat.analysis.look import DARK, LIGHT, Scene
from megatron_reheat.analysis.page import need_drawing, page_template
from megatron_reheat.analysis.rounds import compared_rounds
from megatron_reheat.analysis.tracks import Track, load_tracks
from megatron_reheat.console import duration
from megatron_reheat.errors import ReheatError
from megatron_reheat.run_folder import RunFolder, write_atomically

TEMPLATE = Path(__file__).parent / "report.html.j2"


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report, which `write_report` has written."""

    png: Path
    html: Path


@dataclass(frozen=True)
class RunRow:
    """A row of the page's table of runs; `steps` are the first and the last as `1-20`.

    Entropies are in nats. What was not logged is None.
    """

    run: str
    steps: str
    elapsed_s: float | None
    reheat_rounds: int
    reheat_steps: int
    lowest_entropy: float | None
    last_entropy: float | None
    last_accuracy: float | None
    last_tokens_per_s: float | None


def write_report(run_folders: Sequence[Path], out: Path | None = None) -> ReportPaths:
    """Writes `report.png` and `report.html` (`comparison.*` for several runs) to `out`, or the first run's `report/`.

    Raises:
        ReheatError: a folder has no metrics, or `out` cannot be written; the message names it.
    """
    tracks = load_tracks(run_folders)
    need_drawing("a report")
    from megatron_reheat.analysis.plots import draw_report

    png, page = draw_report(tracks), _page(tracks)
    folder = RunFolder(Path(run_folders[0])).report if out is None else Path(out)
    stem = "report" if len(run_folders) == 1 else "comparison"
    paths = ReportPaths(folder / f"{stem}.png", folder / f"{stem}.html")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(paths.png, png)
        # what a model writes may hold a lone surrogate, which no encoding has
        write_atomically(paths.html, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ReheatError(f"cannot write the report to {folder}: {error.strerror}; choose another folder") from None
    return paths


def _page(tracks: Sequence[Track]) -> str:
    from megatron_reheat.analysis.plots import draw_panels

    filters = {
        "interval": _interval,
        "duration": lambda seconds: "-" if seconds is None else duration(seconds),
        "figure": lambda value: "-" if value is None else f"{value:.4g}",
        "yaml": lambda tree: yaml.safe_dump(tree, sort_keys=False),
    }
    rows = [row for track in tracks for row in evaluations(track)]
    return page_template(TEMPLATE, filters).render(
        title=", ".join(track.name for track in tracks if not track.is_trunk) or tracks[0].name,
        last_step=max(r["step"] for track in tracks for r in track.records),
        themes={"light": LIGHT, "dark": DARK},
        keys=list(zip(*(Scene.of(tracks, theme).legend() for theme in (LIGHT, DARK)), strict=True)),
        panels=draw_panels(tracks),
        evaluations=rows,
        k=_common_k(rows),
        runs=[_run_row(track) for track in tracks],
        limits=samples,
        samples=[(track, samples.sampled_steps(track)) for track in tracks],
        comparisons=[(track, list(compared_rounds(RunFolder(track.folder)))) for track in tracks],
        events=[(track.name, step, text) for track in tracks for step, text in track.events()],
        tracks=tracks,
    )


def _common_k(rows: Sequence[Evaluation]) -> int | None:
    """k of avg@k where it is the same everywhere; otherwise each row says its own."""
    ks = {row.k for row in rows}
    return ks.pop() if len(ks) == 1 else None


def _run_row(track: Track) -> RunRow:
    def last(metric: str) -> float | None:
        values = track.values(metric)
        return values[-1] if values else None

    reheats = [span for span in track.spans() if span.stage == "reheat"]
    steps = [r["step"] for r in track.records if "stage" in r] or [track.records[0]["step"]]
    return RunRow(
        run=track.name,
        steps=f"{steps[0]}-{steps[-1]}",
        elapsed_s=max(track.elapsed_s().values(), default=None),
        reheat_rounds=len(reheats),
        reheat_steps=sum(span.end - span.start for span in reheats),
        lowest_entropy=min(track.values("entropy/mean"), default=None),
        last_entropy=last("entropy/mean"),
        last_accuracy=last("reward/accuracy"),
        last_tokens_per_s=last("throughput/tokens_per_s"),
    )


def _interval(estimate: Estimate) -> str:
    return "" if estimate.low is None else f"[{estimate.low:.3f}, {estimate.high:.3f}]"
