"""One aligned line per step on the terminal; plain text without control codes when stdout is a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from megatron_reheat.types import StageName

STAGE_STYLES: dict[StageName, str] = {"sft": "blue", "rlvr": "green", "reheat": "bold dark_orange"}
HEADER_EVERY = 25
STEP_WIDTH = 12


@dataclass(frozen=True)
class Column:
    title: str
    width: int
    metric: str
    show: Callable[[float], str]


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


COLUMNS = (
    Column("reward", 8, "reward/mean", "{:.3f}".format),
    Column("acc %", 7, "reward/accuracy", lambda x: f"{100 * x:.1f}"),
    Column("entropy", 9, "entropy/mean", "{:.3f}".format),
    Column("KL", 9, "reheat/kl", "{:.1e}".format),
    Column("mismatch", 10, "rollout/mismatch_kl", "{:.1e}".format),
    Column("tokens/s", 10, "throughput/tokens_per_s", "{:,.0f}".format),
    Column("sec", 8, "time/step_s", _seconds),
    Column("rollout", 9, "time/rollout_s", _seconds),
    Column("grade", 7, "time/reward_s", _seconds),
    Column("score", 7, "time/score_s", _seconds),
    Column("update", 8, "time/update_s", _seconds),
    Column("sync", 7, "time/sync_s", _seconds),
)
EVAL_COLUMNS = (("avg@{k}", "eval/avg_at_k"), ("pass@{k}", "eval/pass_at_k"), ("entropy", "eval/entropy"))


class StepConsole:
    """Prints steps, evaluations and events. `num_eval_samples` is the k of avg@k."""

    def __init__(self, total_steps: int, num_eval_samples: int, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._total_steps = total_steps
        self._num_eval_samples = num_eval_samples
        self._lines = 0

    def step(self, step: int, stage: StageName, metrics: Mapping[str, float]) -> None:
        """Metrics that are missing or not finite are absent from `metrics` and shown as a dash."""
        if any(column.metric in metrics for column in COLUMNS):
            if self._lines % HEADER_EVERY == 0:
                self._print(_header())
            self._lines += 1
            self._print(self._row(step, stage, metrics))
        if any(name in metrics for _, name in EVAL_COLUMNS):
            self._print(self._eval_row(step, metrics))

    def event(self, text: str, style: str) -> None:
        self._print(Text(f"--- {text}", style=style))

    def _row(self, step: int, stage: StageName, metrics: Mapping[str, float]) -> Text:
        row = self._begin(stage, STAGE_STYLES[stage], step)
        for column in COLUMNS:
            value = metrics.get(column.metric)
            cell = "-" if value is None else column.show(value)
            row.append(cell.rjust(column.width), style="dim" if value is None else "")
        return row

    def _eval_row(self, step: int, metrics: Mapping[str, float]) -> Text:
        row = self._begin("eval", "magenta", step)
        for title, name in EVAL_COLUMNS:
            if name in metrics:
                row.append(f"   {title.format(k=self._num_eval_samples)} {metrics[name]:.3f}")
        return row

    def _begin(self, label: str, style: str, step: int) -> Text:
        return Text().append(f"{label:<6}", style=style).append(f"{step}/{self._total_steps}".rjust(STEP_WIDTH))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)


def _header() -> Text:
    titles = "".join(column.title.rjust(column.width) for column in COLUMNS)
    return Text(f"{'stage':<6}{'step'.rjust(STEP_WIDTH)}{titles}", style="bold")
