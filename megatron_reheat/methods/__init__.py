"""RL methods, one short file each: what is sampled, what a sample is worth, and the loss. `rl.method` names one."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods.grpo import GRPO, Costs, Tools
from megatron_reheat.recipe import explain

# rl.method -> where it is; a file is read when a recipe names it
METHODS = {
    "grpo": "grpo:GRPO",
    "adaptive_entropy": "adaptive_entropy:AdaptiveEntropy",
    "avspo": "avspo:AVSPO",
    "cispo": "cispo:CISPO",
    "clip_cov": "clip_cov:ClipCov",
    "dppo": "dppo:DPPO",
    "gspo": "gspo:GSPO",
    "kl_cov": "kl_cov:KLCov",
    "oger": "oger:OGER",
    "oisd": "oisd:OISD",
    "opefo": "opefo:OPEFO",
    "rlrt": "rlrt:RLRT",
    "rlsd": "rlsd:RLSD",
    "s2l_po": "s2l_po:S2LPO",
    "sapo": "sapo:SAPO",
    "scope": "scope:SCOPE",
    "sdpg": "sdpg:SDPG",
}


class MethodChoice(NamedTuple):
    """A method's class and its own keys, both checked; `make` gives it what it needs of model and data."""

    cls: type[GRPO]
    options: Section

    def make(self, config: Config, tools: Tools) -> GRPO:
        """
        Raises:
            ConfigError: the model or the data is not what the method needs.
        """
        return self.cls(config, self.options, tools)

    def needs_reference(self, config: Config) -> bool:
        """See `GRPO.needs_reference`."""
        return self.cls.needs_reference(config, self.options)

    def costs(self, config: Config) -> Costs:
        """See `GRPO.costs`."""
        return self.cls.costs(config, self.options)


def choose_method(config: Config) -> MethodChoice:
    """The method that `rl.method` names, checked against the rest of the recipe as far as that needs no model.

    Raises:
        ConfigError: there is no such method, `rl.options` holds a key that it does not have, or the recipe asks for
            something beside it that makes no sense.
    """
    cls = method_class(config.rl.method)
    try:
        options = cls.Options.model_validate(config.rl.options)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(explain(e, section=cls.Options, prefix="rl.options.") for e in error.errors())
        ) from None
    for name in cls.samplers:
        if name not in config.rl.samplers:
            raise ConfigError(
                f"rl.method {config.rl.method} samples from a frozen model besides: give its Hugging Face folder as "
                f"rl.samplers.{name}"
            )
    for name in config.rl.samplers:
        if name not in cls.samplers:
            known = f"its samplers are {', '.join(cls.samplers)}" if cls.samplers else "it has none"
            raise ConfigError(f"rl.samplers.{name}: rl.method {config.rl.method} does not sample from it; {known}")
    for key in GRPO.loss_keys:
        if getattr(config.rl, key) and key not in cls.loss_keys:
            raise ConfigError(
                f"rl.{key}: rl.method {config.rl.method} has a loss of its own, which does not follow it; leave it out"
            )
    for problem in (*cls.problems(config, options), *_staleness_problems(config, cls)):
        raise ConfigError(problem)
    return MethodChoice(cls, options)


def _staleness_problems(config: Config, cls: type[GRPO]) -> Iterator[str]:
    stale = {
        "rollout.overlap=false": "rollout.overlap samples from the policy of a step before"
        if config.rollout.overlap
        else "",
        "rl.max_staleness=0": "rl.max_staleness trains on what a policy before sampled"
        if config.rl.max_staleness
        else "",
    }
    for remedy, what in stale.items():
        if not what or cls.anchored_at_sampler:
            continue
        if "tis_cap" not in cls.loss_keys:
            yield f"{what}, for which the loss of rl.method {config.rl.method} does not correct; set {remedy}"
        elif config.rl.tis_cap is None:
            yield f"{what}; set rl.tis_cap (e.g. 2.0) to correct for it"


def method_class(name: str) -> type[GRPO]:
    """What `rl.method` names.

    Raises:
        ConfigError: there is no such method.
    """
    place = METHODS.get(name)
    if place is not None:
        module, _, cls = place.partition(":")
        return getattr(import_module(f"{__name__}.{module}"), cls)
    file, _, cls = name.rpartition(":")
    if file.endswith(".py"):
        return _of_file(Path(file), cls)
    if name.endswith(".py"):
        raise ConfigError(f"rl.method: {name} is a file; say which class of it as well: {name}:Class")
    close = difflib.get_close_matches(name, METHODS, n=1)
    raise ConfigError(
        f"rl.method: there is no {name!r}; "
        + (f"did you mean {close[0]!r}?" if close else f"it is one of {', '.join(METHODS)}, or path/to/file.py:Class")
    )


@cache
def _of_file(file: Path, name: str) -> type[GRPO]:
    """A method of the user's own. The file is read once, as a module is."""
    if not file.is_file():
        raise ConfigError(f"rl.method: no such file: {file}")
    spec = importlib.util.spec_from_file_location(f"reheat_method_{file.stem}", file)
    assert spec is not None and spec.loader is not None  # .py is what importlib has a loader for
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pydantic and dataclasses look up the names in annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"rl.method: {file} cannot be imported: {type(error).__name__}: {error}") from error
    cls: Any = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, GRPO)):
        there = [n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, GRPO) and c is not GRPO]
        raise ConfigError(
            f"rl.method: {file} has no class {name!r} derived from megatron_reheat.methods.grpo.GRPO"
            + (f"; it has {', '.join(there)}" if there else "")
        )
    return cls
