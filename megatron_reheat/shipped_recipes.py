"""The recipes that come with the package, by name: `reheat train ts_opsd`."""

from __future__ import annotations

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# in a wheel, and in a clone
_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "yaml")


def find_recipe(path: Path) -> Path:
    """`path` itself if there is such a file, else the recipe of that name (`ts_opsd`, `methods/rlrt`) if there is one."""
    name = str(path).removesuffix(".yaml")
    try:
        if path.exists() or path.is_absolute():
            return path
        return next((recipe for folder in _FOLDERS if (recipe := folder / f"{name}.yaml").is_file()), path)
    except (OSError, ValueError):  # no file can have that name, as whoever reads it will say
        return path


def similar(path: Path) -> list[str]:
    """Names of recipes like this one, the closest first."""
    names = [
        str(recipe.relative_to(folder)).removesuffix(".yaml")
        for folder in _FOLDERS
        for recipe in sorted(folder.rglob("*.yaml"))
    ]
    return difflib.get_close_matches(path.name.removesuffix(".yaml"), names, n=3)
