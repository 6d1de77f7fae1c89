"""vLLM's HTTP server, `python -m megatron_reheat.rollout.server.api OPTIONS`; the options are those of vLLM's own module.

vLLM's engine and workers are processes that import the module that the server was started as. This one has them import what
an engine needs, and the HTTP part only where it serves.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module

from megatron_reheat.large_imports import large_imports

with large_imports():
    import vllm.v1.engine.core  # noqa: F401

# not the `vllm` command: it looks for a package of that name, which a CPU build does not have
SERVER = "vllm.entrypoints.openai.api_server"

if __name__ == "__main__":
    with large_imports():
        import_module(SERVER)
    del sys.modules[SERVER]  # runpy warns of modules that it finds imported
    runpy.run_module(SERVER, run_name="__main__")
