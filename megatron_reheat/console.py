"""One aligned line per step, with the columns that the terminal has room for; all of them, without control codes, in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from megatron_reheat.types import StageName

STAGE_STYLES: dict[StageName, str] = {"sft": "blue", "rlvr": "green", "reheat": "bold dark_orange"}
HEADER_EVERY = 25
STEP_WIDTH = 12
FEWEST_LETTERS = 4  # of a suite's name that are worth showing


# not a metric: the seconds until the last step, if the steps go on as they did
LEFT = "left"


@dataclass(frozen=True)
class Column:
    """`rank` says which columns are left out first where the terminal is too narrow: those of the highest."""

    title: str
    width: int
    metric: str
    show: Callable[[float], str]
    rank: int = 0


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """`2h05`, or `4:05` minutes."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


COLUMNS = (
    Column("reward", 8, "reward/mean", "{:.3f}".format),
    Column("acc %", 7, "reward/accuracy", lambda x: f"{100 * x:.1f}"),
    Column("entropy", 9, "entropy/mean", "{:.3f}".format),
    Column("KL", 9, "reheat/kl", "{:.1e}".format, 1),
    Column("mismatch", 10, "rollout/mismatch_kl", "{:.1e}".format, 2),
    Column("tokens/s", 9, "throughput/tokens_per_s", "{:,.0f}".format, 3),
    Column("sec", 7, "time/step_s", _seconds),
    Column("rollout", 8, "time/rollout_s", _seconds, 4),
    Column("grade", 6, "time/reward_s", _seconds, 5),
    Column("score", 6, "time/score_s", _seconds, 5),
    Column("update", 7, "time/update_s", _seconds, 4),
    Column("sync", 6, "time/sync_s", _seconds, 5),
    Column("left", 7, LEFT, duration),
)
EVAL_COLUMNS = (("avg@{k}", "avg_at_k"), ("pass@{k}", "pass_at_k"), ("entropy", "entropy"))


class StepConsole:
    """Prints steps, evaluations and events. `num_eval_samples` is the k of avg@k, by the name of what is evaluated on, which
    is empty for `eval.data`."""

    def __init__(self, total_steps: int, num_eval_samples: Mapping[str, int], console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._total_steps = total_steps
        self._num_eval_samples = num_eval_samples
        self._columns = COLUMNS if not self._console.is_terminal else fitting(self._console.width)
        self._lines = 0
        self._first: tuple[int, float] | None = None  # RL or reheating step, and when it was done

    def step(self, step: int, stage: StageName, metrics: Mapping[str, float]) -> None:
        """Metrics that are missing or not finite are absent from `metrics` and shown as a dash."""
        if any(column.metric in metrics for column in COLUMNS):
            if self._lines % HEADER_EVERY == 0:
                self._print(self._header())
            self._lines += 1
            self._print(self._row(step, stage, {**metrics, **self._time_left(step, stage)}))
        for suite, k in self._num_eval_samples.items():
            prefix = f"eval/{suite}/" if suite else "eval/"
            found = {title.format(k=k): metrics.get(prefix + name) for title, name in EVAL_COLUMNS}
            if any(value is not None for value in found.values()):
                self._print(self._eval_row(step, suite, found))

    def event(self, text: str, style: str) -> None:
        """On a line of its own, in one of rich's styles."""
        self._print(Text(f"--- {text}", style=style))

    def _row(self, step: int, stage: StageName, metrics: Mapping[str, float]) -> Text:
        row = self._begin(stage, STAGE_STYLES[stage], step)
        for column in self._columns:
            value = metrics.get(column.metric)
            cell = "-" if value is None else column.show(value)
            row.append(cell.rjust(column.width), style="dim" if value is None else "")
        return row

    def _eval_row(self, step: int, suite: str, values: Mapping[str, float | None]) -> Text:
        row = self._begin("eval", "magenta", step)
        for title, value in values.items():
            if value is not None:
                row.append(f"  {title} {value:.3f}")
        if not suite:
            return row
        room = self._console.width - len(row) - 2
        if self._console.is_terminal and len(suite) > room >= FEWEST_LETTERS:
            suite = f"{suite[: room - 1]}\N{HORIZONTAL ELLIPSIS}"
        return row.append(f"  {suite}")

    def _begin(self, label: str, style: str, step: int) -> Text:
        return Text().append(f"{label:<6}", style=style).append(f"{step}/{self._total_steps}".rjust(STEP_WIDTH))

    def _header(self) -> Text:
        titles = "".join(column.title.rjust(column.width) for column in self._columns)
        return Text(f"{'stage':<6}{'step'.rjust(STEP_WIDTH)}{titles}", style="bold")

    def _time_left(self, step: int, stage: StageName) -> dict[str, float]:
        """Nothing in the warm start, whose steps tell nothing of the others', and at the first step after it."""
        if stage == "sft":
            return {}
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first, since = self._first
        return {LEFT: (now - since) / (step - first) * (self._total_steps - step)} if step > first else {}

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)


def fitting(width: int) -> tuple[Column, ...]:
    """The columns of one line of a terminal that is so wide; the most important ones at least."""
    for highest in range(max(c.rank for c in COLUMNS), 0, -1):
        chosen = tuple(c for c in COLUMNS if c.rank <= highest)
        if len("stage ") + STEP_WIDTH + sum(c.width for c in chosen) <= width:
            return chosen
    return tuple(c for c in COLUMNS if c.rank == 0)
