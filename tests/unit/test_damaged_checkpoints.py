"""Every fifteenth of the damages of scripts/faults, and what a run folder may hold in the place of its files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_reheat.errors import ConfigError, ReheatError
from megatron_reheat.run_folder import RunFolder, read_config_tree, read_metrics
from tests.e2e.runs import ROOT


@pytest.mark.slow
def test_every_fifteenth_names_the_file_and_the_whole_checkpoint() -> None:
    """In a process of its own, which forks for each of them."""
    command = [sys.executable, "-W", "ignore", "-m", "scripts.faults.damaged_checkpoints", "--every", "15"]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    damages, tries, *_, right, _, ran = next(
        line.split()[1:] for line in done.stdout.splitlines() if line.startswith("all ")
    )
    assert int(damages) > 15 and right == tries and ran == "0"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_what_is_no_file_is_not_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"run\.folder: .*{name} is not a file; move it away"):
        RunFolder(tmp_path).check()
    if name == "metrics.jsonl":
        with pytest.raises(ReheatError, match=r"holds no metrics\.jsonl"):
            read_metrics(tmp_path)
    else:
        assert read_config_tree(tmp_path) == {}


@pytest.mark.parametrize("text", [b"a: [", b"a: \xff", b"[" * 50_000, b"a: \x00"])
def test_a_configuration_that_cannot_be_read_is_one_line(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(ReheatError, match=r"config\.yaml cannot be read: .*; put the run's own back") as refused:
        read_config_tree(tmp_path)
    assert "\n" not in str(refused.value)
