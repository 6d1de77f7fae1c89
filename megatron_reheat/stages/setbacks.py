"""What there is to go on from when a run's loss or gradients are not finite any more.

A checkpoint is good when it was saved after a finite step, and proven when a finite step came after it as well: weights can be
finite themselves and give nothing finite any more.
"""

from __future__ import annotations

from pathlib import Path

from megatron_reheat.checkpoint_folder import LATEST, checkpoint_step, latest_checkpoint, list_checkpoints
from megatron_reheat.errors import NonFiniteLossError, ReheatError
from megatron_reheat.model.checkpoint import read_state


def proven_checkpoint(folder: Path, last_finite: int, *, since: int = 0) -> Path | None:
    """The newest proven checkpoint, of step `since` or later, of a run whose last finite step was `last_finite`."""
    good = ((checkpoint_step(path) or 0, path) for path in reversed(_good_checkpoints(folder)))
    return next((path for step, path in good if step >= since and step != last_finite), None)


def not_finite(
    skipped: int, limit: int, folder: Path, last_finite: int, forked_from: Path | None
) -> NonFiniteLossError:
    """The end of a run after `skipped` steps in a row, naming what is good under `folder`; the same on every rank."""
    failure = NonFiniteLossError(
        f"loss or gradient was not finite for {skipped} steps in a row (optimizer.max_skipped_steps {limit}); "
        f"{_what_is_good(folder, last_finite, forked_from)}; lower optimizer.lr or check the data"
    )
    failure.on_every_rank = True
    return failure


def _what_is_good(folder: Path, last_finite: int, forked_from: Path | None) -> str:
    good = _good_checkpoints(folder)
    if not good:
        return f"the latest good checkpoint is {forked_from or 'none yet'}"
    text = f"the latest good checkpoint is {good[-1]}"
    if checkpoint_step(good[-1]) == last_finite and len(good) > 1:
        text += f", from which no step was finite; one of before is {good[-2]}"
        good.pop()
    if good[-1] != latest_checkpoint(folder):
        text += f" (to go on from there, write {good[-1].name} into {folder / LATEST})"
    return text


def _good_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return [path for path in list_checkpoints(folder) if _is_of_finite_step(path)]


def _is_of_finite_step(checkpoint: Path) -> bool:
    """Earlier versions saved while steps were being skipped, too."""
    try:
        return not read_state(checkpoint).get("skipped_in_row")
    except ReheatError:
        return False
