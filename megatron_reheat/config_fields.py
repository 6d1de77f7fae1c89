"""What the fields of a recipe's sections are made of: limits, types with a check, and the section itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    field_validator,
)
from pydantic_core import PydanticCustomError

from megatron_reheat import recipe_text
from megatron_reheat.confidential import TOKEN_VARIABLE, redact, redact_text

MAX_SHOWN = 80  # characters of a wrong value in an error
# A number beyond these is a slip of the keyboard: counts go into 64-bit counters, floats into float32 where they are multiplied
MAX_NUMBER = {int: 2**32, float: 1e30}
MAX_REWARD = 1e6  # a group's deviation squares it
# what every run logs as reward/NAME (`stages.collect.rollout_metrics`), which a function's values must not hide
LOGGED_REWARDS = frozenset(("mean", "accuracy", "timeouts", "uniform_group_fraction"))
# what an evaluation logs as eval/METRIC, where the name of a suite stands, too
EVAL_METRICS = frozenset(("avg_at_k", "pass_at_k", "entropy", "response_length"))
MAX_FUNCTIONS = 8  # of reward.function; a grader's reply has a fixed size
MAX_PROCESSES = 4096  # ranks along a dimension, servers, graders, threads
MAX_PROMPTS = 2**20  # of one step, all of which are in memory together
MAX_PATH, MAX_FILE_NAME = 4095, 255  # bytes, Linux's
# vLLM refuses more, and makes 0.01 of what lies between 0 and that without a word
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
MAX_SAMPLES = 16384  # of one prompt; vLLM's VLLM_MAX_N_SEQUENCES
MAX_SEED = 2**32 - 1  # numpy's global generator, which vLLM seeds, takes 32 bits
MAX_WAIT_S = 2e6  # poll() counts milliseconds in 31 bits


class Section(BaseModel):
    """Frozen. Refuses unknown keys, NaN, infinities, numbers beyond MAX_NUMBER and NUL characters."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        limit = MAX_NUMBER.get(type(value))
        if limit is not None and abs(value) > limit:
            raise ValueError(f"must lie between {-limit:.0e} and {limit:.0e}")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("must not hold a NUL character")
        return value


def checked_url(url: str) -> str:
    """
    Raises:
        ValueError: it is no server's http or https URL, or holds a user or password.
    """
    try:
        parts = urlsplit(url)
        has_host = re.fullmatch(r"[\w.:%-]+", parts.hostname or "") is not None and parts.port != 0
        has_more = bool(parts.query or parts.fragment) or not url.isprintable()
        is_server = parts.scheme in ("http", "https") and has_host and not has_more
    except ValueError:  # a port beyond 65535
        is_server = False
    if not is_server:
        raise ValueError(f"{url!r} is not the URL of a server (e.g. http://gpu-7:8300)")
    if parts.username is not None or parts.password is not None:
        # not shown: it is a secret, and a configuration is written into files
        raise PydanticCustomError(
            "secret_in_url",
            "must not hold a user or password; put the token into {variable}",
            {"variable": TOKEN_VARIABLE},
        )
    return url


def check_temperature(temperature: float) -> float:
    """
    Raises:
        ValueError: vLLM would not sample at it.
    """
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"vLLM samples at temperatures from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}")
    return temperature


def _full_dtype_name(name: Any) -> Any:
    """The short names that other projects use; of half precision it says why it is not there."""
    if not isinstance(name, str):
        return name
    short = name.strip().lower().removeprefix("torch.")
    if short in ("fp16", "float16", "f16", "half"):
        raise ValueError(
            f"{name!r} is not supported: gradients overflow it without loss scaling; use bfloat16 or float32"
        )
    return {"bf16": "bfloat16", "fp32": "float32", "f32": "float32", "float": "float32"}.get(short, short)


Temperature = Annotated[float, AfterValidator(check_temperature)]
Url = Annotated[str, AfterValidator(checked_url)]
FullDtypeName = BeforeValidator(_full_dtype_name)


def check_path(path: str) -> str:
    """
    Raises:
        ValueError: no file can have that name.
    """
    if not path.isprintable():
        raise ValueError("must not hold line breaks or other control characters")
    name = max((os.fsencode(part) for part in path.split("/")), key=len)
    if len(os.fsencode(path)) > MAX_PATH or len(name) > MAX_FILE_NAME:
        raise ValueError(f"must have at most {MAX_PATH} bytes, and {MAX_FILE_NAME} between slashes")
    return path


PathText = Annotated[str, AfterValidator(check_path)]


def checked_path(path: Any) -> Any:
    """One path as it is, several as a tuple; None stays None.

    Raises:
        ValueError: it is none of these, or no file can have such a name.
    """
    names = [path] if isinstance(path, str) else path
    if path is not None and not (
        isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names) and names
    ):
        raise ValueError(f"must be a file, a folder or a list of files, not {shown(path)}")
    for name in names or ():
        check_path(name)
    return tuple(path) if isinstance(path, list) else path


def absolute_file(named: str) -> str:
    """`file.py:name` of the user's own is found from any folder, as the resolved recipe of its run may be read from another."""
    file, _, name = named.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{name}" if file.endswith(".py") else named


def weighted_functions(functions: Any) -> Any:
    """Weights by function, as `path/to/file.py:name` (then absolute, as a method's file is) or `package.module:name`."""
    if isinstance(functions, str):
        functions = {functions: 1.0}
    if not isinstance(functions, Mapping):
        return functions
    for function in functions:
        place, colon, name = str(function).rpartition(":")
        if not (place and colon and name.isidentifier()):
            raise ValueError(f"{function!r} is not path/to/file.py:name or package.module:name")
    names = [str(function).rpartition(":")[2] for function in functions]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two functions are called {min(twice)}, under which their values are logged; rename one")
    if hidden := LOGGED_REWARDS.intersection(names):
        raise ValueError(
            f"a function called {min(hidden)} would be logged as reward/{min(hidden)}, which is taken; rename it"
        )
    if len(functions) > MAX_FUNCTIONS:
        raise ValueError(f"at most {MAX_FUNCTIONS} functions; let one of them call the others")
    return {absolute_file(str(function)): weight for function, weight in functions.items()}


# `null` is an empty mapping, which is how a recipe takes back what its base put there
NO_NULL = BeforeValidator(lambda mapping: {} if mapping is None else mapping)
Switch = bool | Literal["auto"]  # auto: on GPUs; a CPU's cores are busy with what they would have to do beside
Options = Annotated[dict[str, Any], NO_NULL]  # a mapping that is passed on


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError("a name is made of letters, digits, - and _")
    if name in EVAL_METRICS:
        raise ValueError(f"{name} is what a metric is called; choose another name")
    return name


# of a data set of the user's own, part of metrics' names
Name = Annotated[str, AfterValidator(_checked_name)]


def eval_metric(metric: str) -> str:
    """
    Raises:
        ValueError: no evaluation logs a metric of that name that a checkpoint could be the best by.
    """
    if not re.fullmatch(r"eval/([A-Za-z0-9_-]+/)?(avg|pass)_at_k", metric):
        raise ValueError("must be eval/avg_at_k, eval/pass_at_k, or the same of a suite, as eval/NAME/avg_at_k")
    return metric


def inherited(section: Any, common: Any, key: str, without: Sequence[str] = ()) -> Any:
    """`section` with the mappings under its `key` completed by what they leave out of `common`."""
    if not isinstance(section, Mapping) or not isinstance(parts := section.get(key), Mapping):
        return section
    if isinstance(common, BaseModel):
        common = common.model_dump()
    given = common.items() if isinstance(common, Mapping) else ()
    shared = {k: v for k, v in given if k != key and k not in without}
    return {**section, key: {n: {**shared, **p} if isinstance(p, Mapping) else p for n, p in parts.items()}}


def shown(value: Any) -> str:
    """A wrong value for an error: a sentence can hold only its beginning, and some values cannot be written whole."""
    text = redact_text(recipe_text.describe(redact(value, passed_on=True)))
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
