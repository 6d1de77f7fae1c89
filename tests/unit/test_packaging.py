"""What a wheel holds, and what is asked for in one sentence where an extra is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_reheat.config import RewardConfig
from megatron_reheat.errors import ConfigError
from megatron_reheat.recipe import load_config
from megatron_reheat.rewards import graders

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_wheel_holds_the_recipes_and_runs_them_by_name(tmp_path: Path) -> None:
    command = [
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
    ]
    # of a copy: building leaves files beside the sources
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("megatron_reheat", "yaml", "tests/unit"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", *command, str(copy)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    shipped = {f"megatron_reheat/recipes/{path.relative_to(ROOT / 'yaml')}" for path in (ROOT / "yaml").rglob("*.yaml")}
    assert shipped <= names and "megatron_reheat/py.typed" in names
    templates = ("analysis/parts.html.j2", "analysis/report.html.j2", "microscope/compare.html.j2")
    assert {f"megatron_reheat/{name}" for name in ("cluster/job.sbatch.template", *templates)} <= names
    assert not any(name.startswith(("tests/", "examples/", "scripts/")) for name in names)
    code = (
        "import megatron_reheat.recipe as c; assert 'installed' in c.__file__;"
        "print(c.load_config('methods/rlrt').rl.method, c.load_config('ts_opsd.yaml').run.name)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "installed", capture_output=True, text=True)
    assert ran.stdout == "rlrt ts_opsd\n", ran.stderr


def test_recipes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("qwen3_0.6b_gsm8k") == load_config(ROOT / "yaml" / "qwen3_0.6b_gsm8k.yaml")
    (tmp_path / "ts_opsd").write_text("base: ts_opsd.yaml\n")  # a file comes first
    with pytest.raises(ConfigError, match=r"no such config file: .*ts_opsd\.yaml, named as base by"):
        load_config("ts_opsd")
    with pytest.raises(
        ConfigError, match=r"no such config file: .*/qwen3_4b_ts_ops; did you mean the recipe qwen3_4b_ts_opsd"
    ):
        load_config("qwen3_4b_ts_ops")


@pytest.mark.parametrize(
    ("kind", "fix"),
    [("math", r"pip install 'math-verify\[antlr4_13_2\]'"), ("reasoning_gym", "pip install 'reasoning-gym'")],
)
def test_a_missing_grader_is_told_before_anything_is_started(
    kind: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graders, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=f"^reward.kind={kind} needs .*; {fix}$"):
        graders.check_reward(RewardConfig(kind=kind))  # type: ignore[arg-type]
