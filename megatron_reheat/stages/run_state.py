"""What a checkpoint keeps besides weights and optimizer, and how it is read back, from other versions too."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_reheat.errors import ReheatError
from megatron_reheat.model.checkpoint import STATE, read_state, use_instead
from megatron_reheat.stages.controller import ControllerState

_OTHER_VERSION = (
    "another version of megatron_reheat wrote it: go on with that version, or from a checkpoint of this one"
)
_Count = Annotated[int, Field(ge=0)]


@dataclass
class RunState:
    """`step` counts every stage's steps, the warm start's first, `rl_step` those of RL in this run.

    `entropy` is that of the last RL or reheating step in nats, `rollbacks` counts how often the run went back to an earlier
    checkpoint, `method` is the name of the method (`rl.method`) and what it keeps between steps. `best` holds the best
    evaluation so far by the metric's name (`checkpoint.keep_best`), `date` the day the run began, which chat templates may
    print. `reference` is the digest of the reference policy (`stages.reference`), `kept_fraction` the collector's, as `surplus`
    is, the groups it kept for later steps (`rl.max_staleness`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    step: _Count = 0
    policy_version: _Count = 0
    rl_step: _Count = 0
    entropy: float | None = None
    skipped_in_row: _Count = 0
    rollbacks: _Count = 0
    controller: dict[str, Any] = field(default_factory=lambda: ControllerState().to_json())
    cursor: dict[str, Any] | None = None
    sft_cursor: dict[str, Any] | None = None
    best: dict[str, float] = field(default_factory=dict)
    date: str | None = None
    method: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    kept_fraction: float | None = None
    surplus: list[dict[str, Any]] = field(default_factory=list)


def read_run_state(checkpoint: Path) -> RunState:
    """The state of a checkpoint; what an earlier version did not keep yet has its default.

    Raises:
        ReheatError: it cannot be read, or holds something that this version does not know.
    """
    raw = read_state(checkpoint)
    if "step" not in raw:
        raise other_version(checkpoint, "it lacks the key step, without which nothing can go on from it")
    try:
        # as JSON, because strict Python values would have to be these classes already
        state = TypeAdapter(RunState).validate_json(json.dumps(raw))
        TypeAdapter(ControllerState).validate_json(json.dumps(state.controller))
        if state.date is not None:
            date.fromisoformat(state.date)
    except ValidationError as error:
        raise other_version(checkpoint, _explain(error)) from None
    except ValueError:
        raise other_version(checkpoint, f"date {state.date!r} is not a day (YYYY-MM-DD)") from None
    return state


def other_version(checkpoint: Path, problem: str) -> ReheatError:
    """The files are what was saved, and this version cannot go on from what they say."""
    return ReheatError(f"{checkpoint / STATE}: {problem}; {_OTHER_VERSION}; {use_instead(checkpoint)}")


def _explain(error: ValidationError) -> str:
    found = error.errors()
    inside = "" if error.title == "RunState" else "controller."
    unknown = [inside + ".".join(map(str, e["loc"])) for e in found if e["type"] == "unexpected_keyword_argument"]
    if unknown:
        return f"this version does not know the key{'s'[: len(unknown) > 1]} {', '.join(unknown)}"
    first = found[0]
    return f"{inside}{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}"
