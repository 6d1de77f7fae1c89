"""How a page is made of its template: what the templates' filters are, and where `parts.html.j2` lies."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_reheat.analysis.look import LineStyle
from megatron_reheat.errors import ReheatError

if TYPE_CHECKING:
    from jinja2 import Template

PARTS = Path(__file__).parent


def need_drawing(what: str) -> None:
    """
    Raises:
        ReheatError: `what` cannot be made without a package that is not installed; the message names it.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ReheatError(f"{what} needs {error.name}; pip install 'megatron-reheat[report]'") from None


def page_template(path: Path, filters: Mapping[str, Callable[..., str]]) -> Template:
    """A template that escapes what it is given and knows these filters beside `decimals`, `dashes` and `data_url`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([path.parent, PARTS]), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"decimals": decimals, "dashes": _dashes, "data_url": _data_url, **filters}
    return environment.get_template(path.name)


def decimals(value: float | None, digits: int = 3) -> str:
    """With `digits` places and commas between thousands; a dash for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _dashes(style: LineStyle, width: float = 3.0) -> str:
    """matplotlib's dashes, in line widths, as SVG's."""
    return "none" if isinstance(style, str) else " ".join(f"{width * length:g}" for length in style[1])
