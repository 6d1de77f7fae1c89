"""Rewards of the user's own: Python functions that `reward.function` names, in a file or in a module.

    def score(response: str, record: dict) -> float: ...

`record` is the prompt's record as the data has it. What comes back is a number, or a number and whether the response counts
as correct; without the latter it does where the weighted sum of all functions reaches `reward.correct_at`.
"""

from __future__ import annotations

import ast
import copy
import difflib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_reheat.errors import ConfigError

MAX_VALUE = 1e6  # a group's deviation squares it

RewardFunction = Callable[[str, dict[str, Any]], Any]


class Score(NamedTuple):
    """`values` are the functions' own, before their weights, in the recipe's order."""

    correct: bool
    values: tuple[float, ...]


class FunctionGrader:
    """A grader made of reward functions; `verifier` is `{"record": ..., "where": the record's place in the data}`."""

    def __init__(self, weights: Mapping[str, float], correct_at: float) -> None:
        """`weights` by `path/to/file.py:name` or `package.module:name`.

        Raises:
            ConfigError: one cannot be imported.
        """
        self._functions = {name: _import(name) for name in weights}
        self._weights = tuple(weights.values())
        self._correct_at = correct_at

    def __call__(self, response: str, verifier: Mapping[str, Any]) -> Score:
        """
        Raises:
            RewardFunctionError: a function raised, or returned something else; names function and record.
        """
        read = [self._ask(name, response, verifier) for name in self._functions]
        values = tuple(value for value, _ in read)
        said = [correct for _, correct in read if correct is not None]
        total = math.fsum(w * v for w, v in zip(self._weights, values, strict=True))
        return Score(all(said) if said else total >= self._correct_at, values)

    def _ask(self, name: str, response: str, verifier: Mapping[str, Any]) -> tuple[float, bool | None]:
        try:
            return _read(self._functions[name](response, copy.deepcopy(verifier["record"])))
        except Exception as error:  # the user's code may raise anything
            where, function = verifier["where"], short_name(name)
            raise RewardFunctionError(f"{where}: {function}: {type(error).__name__}: {error}") from error


class RewardFunctionError(Exception):
    """A reward function failed on a response."""


def short_name(function: str) -> str:
    """What its values are logged as."""
    return function.rpartition(":")[2]


def check_functions(functions: Iterable[str]) -> None:
    """Whether there are such functions, as far as can be told without running anybody's code.

    Raises:
        ConfigError: naming the file or module, and what it has instead.
    """
    for function in functions:
        place, _, name = function.rpartition(":")
        if place.endswith(".py"):
            source = _source(Path(place))
            if name not in _bound_names(source):
                there = [n.name for n in source.body if isinstance(n, ast.FunctionDef)]
                close = difflib.get_close_matches(name, there, n=1)
                has = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(there) or 'none'}"
                raise ConfigError(f"reward.function: {place} has no function {name!r}{has}")
        elif not _is_module(place):
            raise ConfigError(
                f"reward.function: there is no module {place!r} that Python finds from here; give path/to/file.py:{name}, or "
                "put its folder into PYTHONPATH"
            )


def _source(path: Path) -> ast.Module:
    if not path.is_file():
        raise ConfigError(f"reward.function: no such file: {path}")
    try:
        return ast.parse(path.read_text(), str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"reward.function: {path} cannot be read: {type(error).__name__}: {error}") from None


def _bound_names(source: ast.Module) -> set[str]:
    """Functions, classes, imported and assigned names, wherever they stand: only running the file would tell more."""
    names: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _is_module(name: str) -> bool:
    """Packages around it are imported, as Python does to find it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _import(function: str) -> RewardFunction:
    place, _, name = function.rpartition(":")
    try:
        module = _of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except BaseException as error:  # sys.exit included
        raise ConfigError(f"reward.function: {place} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"reward.function: {place} has no function {name!r}")
    return found


def _of_file(path: Path) -> Any:
    name = f"reheat_reward_{path.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # .py is what importlib has a loader for
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))  # what lies beside it can be imported, as from a script
    spec.loader.exec_module(module)
    return module


def _read(returned: Any) -> tuple[float, bool | None]:
    value, correct = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"returned {returned!r:.80}; return a number, or (number, is correct)") from None
    if not abs(value) <= MAX_VALUE:
        raise ValueError(f"returned {value}; a reward must be a number between -{MAX_VALUE:g} and {MAX_VALUE:g}")
    return value, None if correct is None else bool(correct)
