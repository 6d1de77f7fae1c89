"""The Triton kernels on the CPU: Triton's interpreter runs every test of the plain backend, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED_TESTS = ("test_tempered_kl.py", "test_fused_head.py", "test_vocab_properties.py")


def test_the_kernels_pass_every_test_of_the_plain_backend():
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / t) for t in SHARED_TESTS)]
    program = (
        "import sys, pytest, torch\n"
        "from megatron_reheat.parallel import vocab_triton\n"
        "calls = []\n"
        "for name in ('shard_sums', 'write_gradient'):\n"
        "    def counted(*args, kernel=getattr(vocab_triton, name), name=name):\n"
        "        calls.append(name)\n"
        "        return kernel(*args)\n"
        "    setattr(vocab_triton, name, counted)\n"
        "status = pytest.main(sys.argv[1:])\n"
        "print('kernel calls', calls.count('shard_sums'), calls.count('write_gradient'))\n"
        "sys.exit(status or min(calls.count('shard_sums'), calls.count('write_gradient')) < 100)\n"
    )
    command[1:3] = ["-c", program]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
