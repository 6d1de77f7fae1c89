"""A reward worker that runs every answer as Python: the day on which all guards have failed. For tests of the sandbox only.

An answer is right if it leaves `value` equal to `verifier["answer"]`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from typing import Any


def run(response: str, verifier: Mapping[str, Any]) -> float:
    scope: dict[str, Any] = {}
    exec(response, scope)
    return float(scope.get("value") == verifier["answer"])


if __name__ == "__main__":
    # In place of the real graders, which take seconds to load.
    graders = types.ModuleType("megatron_reheat.rewards.graders")
    vars(graders).update(grader_of=lambda kind: run, Grader=Any)
    sys.modules[graders.__name__] = graders

    from megatron_reheat.rewards import worker

    worker.TRIALS["reasoning_gym"] = [("value = 1", {"answer": 1}, True), ("value = 2", {"answer": 1}, False)]
    worker.main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
