"""How long before its end a batch job is told: enough for the step it is in and a save, and less than the whole job."""

from __future__ import annotations

import math
import re

from megatron_reheat.cluster.estimate import Estimate
from megatron_reheat.errors import ConfigError

MIN_NOTICE_S, MAX_NOTICE_S = 120, 65535  # the upper bound is Slurm's
# of the estimated step: the notice may come at its very beginning, and no estimate is exact
STEP_MARGIN = 1.5
ROUND_S = 60
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?$")
_NO_LIMIT = ("0", "-1", "UNLIMITED", "INFINITE")


def notice_for(estimate: Estimate) -> tuple[int, str]:
    """Seconds for the longer of the two kinds of steps and a save, and what they are made of."""
    steps = [sum(estimate.rl_step().values())]
    if estimate.config.controller.trains:
        steps.append(sum(estimate.reheat_step().values()))
    step, save = max(steps), estimate.save_seconds()
    notice = math.ceil((STEP_MARGIN * step + save) / ROUND_S) * ROUND_S
    return min(max(MIN_NOTICE_S, notice), MAX_NOTICE_S), f"a step takes about {step:.0f} s and a save {save:.0f} s"


def check_against_limit(notice_s: int, what: str, limit: str | None) -> None:
    """`what` names the notice in an error.

    Raises:
        ConfigError: the notice would come before the job begins, or Slurm does not take it; or `limit` is no time.
    """
    if notice_s > MAX_NOTICE_S:
        raise ConfigError(f"{what} is above Slurm's limit of {MAX_NOTICE_S} seconds")
    seconds = seconds_of(limit)
    if seconds is not None and notice_s >= seconds:
        raise ConfigError(
            f"{what} is not shorter than the job, --time {limit} ({seconds} s): it would be told to stop before it begins; "
            "raise --time or lower --requeue-signal-s"
        )


def seconds_of(limit: str | None) -> int | None:
    """Of sbatch's --time; None where there is no limit, or it is the partition's.

    Raises:
        ConfigError: it is in none of sbatch's forms.
    """
    if limit is None or limit.upper() in _NO_LIMIT:
        return None
    match = _TIME.match(limit)
    if match is None:
        raise ConfigError(
            f"--time {limit} is not a time; write minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        )
    days, *parts = match.groups()
    given = [int(part) for part in parts if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*given, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(given) == 3:
        return (given[0] * 60 + given[1]) * 60 + given[2]
    minutes, seconds = (*given, 0)[:2]
    return minutes * 60 + seconds
