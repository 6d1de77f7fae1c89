"""The notebook's cells, one after the other, as they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "notebooks" / "tempered_kl.ipynb"


@pytest.mark.slow
def test_it_reheats_a_collapsed_policy() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)  # figures of one machine would not be another's
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["sharpened"][-1] < 0.6 * names["sharpened"][0]
    assert names["reheated"][-1] > 1.05 * names["reheated"][0]
    assert (names["after"] - names["before"] / 1.2).abs().max() < 1e-4
