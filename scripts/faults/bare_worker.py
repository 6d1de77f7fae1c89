"""`executing_worker` on a machine without namespaces and without libseccomp: only the limits and the audit hook are left."""

from __future__ import annotations

import runpy

from megatron_reheat.rewards import sandbox


class NoFilter(sandbox.SystemCallFilter):
    def __init__(self) -> None:
        raise OSError("libseccomp.so.2: cannot open shared object file")


if __name__ == "__main__":
    sandbox.enter_namespaces = lambda: ""
    sandbox.SystemCallFilter = NoFilter  # type: ignore[misc]
    runpy.run_module("scripts.faults.executing_worker", run_name="__main__")
