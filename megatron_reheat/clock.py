"""Where a step's seconds go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Sums wall seconds per phase from its creation on; what no phase claims is `other`."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._phases: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds inside to `name`, also when it raises; inside another phase they count in both."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] += time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """`time/<phase>_s`, `time/other_s` and their sum `time/step_s`."""
        total = time.perf_counter() - self._started
        seconds = {f"time/{name}_s": s for name, s in self._phases.items()}
        return {**seconds, "time/other_s": max(total - sum(seconds.values()), 0.0), "time/step_s": total}
