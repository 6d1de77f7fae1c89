"""What is imported without the garbage collector, and what is not imported at all."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from megatron_reheat.large_imports import large_imports


def test_the_collector_is_off_for_imports_alone() -> None:
    with pytest.raises(ImportError), large_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_the_guardian_of_a_server_does_without_torch() -> None:
    code = "import megatron_reheat.rollout.server.process, sys; print({'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
