"""How far the weights of one policy lie from another's, block by block: read tensor by tensor, never a whole model."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_reheat.analysis.rounds import OVERALL
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import EMBEDDING, HEAD, tensor_shapes
from megatron_reheat.model.provider import read_hf_config

HEAD_BLOCK = "head"
# elements whose float64 copies exist at a time
CHUNK = 1 << 22
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class BlockDisplacement:
    """Of the embedding, a layer, the final norm, the head (where it is not the embedding), or of all weights.

    `norm` is ||W_A||_F, `moved` is ||W_B - W_A||_F and `relative` their ratio. `cosine` is that of W_B - W_A and W_C - W_A,
    None without a reference C, or where one of them did not move.
    """

    block: str
    norm: float
    moved: float
    relative: float | None
    cosine: float | None


@dataclass
class _Sums:
    """Squared lengths of W_A, W_B - W_A and W_C - W_A, and the product of the last two."""

    own: float = 0.0
    moved: float = 0.0
    other: float = 0.0
    product: float = 0.0

    def add(self, a: Tensor, b: Tensor, c: Tensor | None) -> None:
        parts = [tensor.flatten().split(CHUNK) for tensor in (a, b, *([] if c is None else [c]))]
        for own, *others in zip(*parts, strict=True):
            start = own.double()
            moves = [other.double() - start for other in others]
            self.own += float(start @ start)
            self.moved += float(moves[0] @ moves[0])
            if c is not None:
                self.other += float(moves[1] @ moves[1])
                self.product += float(moves[0] @ moves[1])

    def result(self, block: str) -> BlockDisplacement:
        lengths = math.sqrt(self.moved) * math.sqrt(self.other)
        return BlockDisplacement(
            block,
            math.sqrt(self.own),
            math.sqrt(self.moved),
            math.sqrt(self.moved / self.own) if self.own else None,
            self.product / lengths if lengths else None,
        )


def same_weights(folder: Path, other: Path) -> bool:
    """Whether two folders hold tensors of the same names and shapes."""
    return tensor_shapes(read_hf_config(folder)) == tensor_shapes(read_hf_config(other))


def displacement(a: Path, b: Path, c: Path | None = None) -> list[BlockDisplacement]:
    """The blocks in the order in which a token goes through them, then all of them together. Sums are kept in float64.

    Args:
        a: a Hugging Face folder, as are b and c, the reference; their tensors have the same names and shapes.
    """
    names = tensor_shapes(read_hf_config(a))
    readers = [HFReader(folder) for folder in (a, b, *([] if c is None else [c]))]
    blocks: dict[str, _Sums] = {}
    overall = _Sums()
    for name in sorted(names, key=_order):
        own, other, *third = (reader.get(name) for reader in readers)
        for sums in (blocks.setdefault(_block(name), _Sums()), overall):
            sums.add(own, other, third[0] if third else None)
    return [*(sums.result(block) for block, sums in blocks.items()), overall.result(OVERALL)]


def _order(name: str) -> tuple[int, str]:
    if name == EMBEDDING:
        return -1, name
    layer = _LAYER.match(name)
    return (int(layer[1]), name) if layer else (sys.maxsize if name == HEAD else sys.maxsize - 1, name)


def _block(name: str) -> str:
    if layer := _LAYER.match(name):
        return f"layer {int(layer[1]) + 1}"
    return {EMBEDDING: "embedding", HEAD: HEAD_BLOCK}.get(name, "final norm")
