"""Cuts a train batch into packed micro-batches for one data-parallel rank, and puts per-token results back.

Sequences are laid end to end (THD layout, no padding between them). Logits at position i predict token i + 1, so everything
a loss needs is stored at the position that predicts it: `targets[i]` is the next token, and `loss_weights[i]` is zero
wherever the next token is not part of a response. With it a rank of a context-parallel group has all that it needs of its own
positions (`MicroBatch.part`), even where the next token is another rank's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_reheat.metrics import MetricSums
from megatron_reheat.parallel.context import ContextSplit
from megatron_reheat.parallel.vocab import Vocabulary
from megatron_reheat.types import FloatArray, TrainBatch, TrainSequence

Aggregation = Literal["token_mean", "sequence_mean"]


_PER_TOKEN = (
    "tokens", "position_ids", "targets", "loss_mask", "loss_weights", "sequence_weights", "advantages", "old_logprobs",
    "rollout_logprobs",
)  # fmt: skip


@dataclass(frozen=True)
class MicroBatch:
    """T packed tokens of some sequences, padded at the end to a multiple of the alignment; or a part of each of them.

    tokens, position_ids, targets:  [T] int64
    cu_seqlens:                     [S+1] int32, the last sequence may be padding
    loss_mask:                      [T] float32, 1 where `targets` is a response token
    loss_weights:                   [T] float32, share of each token in the batch's loss; they sum to 1 over the whole batch
    sequence_weights:               [T] float32, what they would be if each response weighed the same (sequence_mean)
    advantages, old_logprobs, rollout_logprobs: [T] float32, zero outside responses
    extra:                          further such columns of the sequences, by name; zero for a sequence without
    readings:                       other vocabularies at the same positions, by name: a view's, an intermediate layer's
    keep:                           takes log-probabilities and entropies of a batch that was not scored before (`scored`)
    whole, split:                   what this is a part of, and how that lies on the ranks; None where it is the whole
    """

    sequence_indices: tuple[int, ...]
    tokens: Tensor
    position_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    loss_mask: Tensor
    loss_weights: Tensor
    sequence_weights: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    readings: Mapping[str, Vocabulary] = field(default_factory=dict)
    keep: Callable[[Tensor, Tensor], None] | None = None
    whole: MicroBatch | None = None
    split: ContextSplit | None = None

    def scored(self, logprobs: Tensor, entropy: Tensor) -> MicroBatch:
        """With what the policy's forward pass says, [T] each, as `old_logprobs`, where nobody scored the batch before: in the
        first update since it was sampled that is the same policy."""
        if self.keep is None:
            return self
        self.keep(logprobs.detach(), entropy.detach())
        return replace(self, old_logprobs=logprobs.detach())

    def by_sequence(self, *values: Tensor) -> dict[int, tuple[FloatArray, ...]]:
        """[N] values of the response tokens, in order -> {index in the train batch: [R] of each}, zero for tokens of other
        parts."""
        if self.whole is not None and self.split is not None:
            here, num_tokens = self.split.here[self.positions], len(self.whole.tokens)
            spread = (v.new_zeros(num_tokens).index_copy(0, here, v.detach()) for v in values)
            return self.whole.by_sequence(*(v[self.whole.positions] for v in spread))
        mask = self.loss_mask.bool().cpu().numpy()
        borders = self.cu_seqlens.tolist()[: len(self.sequence_indices) + 1]
        counts = [int(mask[start:end].sum()) for start, end in itertools.pairwise(borders)]
        columns = [np.split(v.detach().float().cpu().numpy(), np.cumsum(counts)[:-1]) for v in values]
        return dict(zip(self.sequence_indices, zip(*columns, strict=True), strict=True)) if counts else {}

    @property
    def positions(self) -> Tensor:
        """[N] where the response tokens are predicted, in order."""
        return self.loss_mask.nonzero()[:, 0]

    def at(self, positions: Tensor | slice) -> MicroBatch:
        """What a loss needs, at some positions only; the packing (`cu_seqlens`) stays that of the whole micro-batch."""
        extra = {name: column[positions] for name, column in self.extra.items()}
        return replace(self, extra=extra, **{name: getattr(self, name)[positions] for name in _PER_TOKEN})

    def part(self, rank: int, size: int, group: dist.ProcessGroup) -> MicroBatch:
        """Context rank `rank`'s tokens of every sequence, whose borders are then those of what is left of each."""
        split = ContextSplit(self.cu_seqlens, rank, size, group)
        return replace(self.at(split.here), cu_seqlens=self.cu_seqlens // size, whole=self, split=split)

    def total(self, sums: Tensor) -> Tensor:
        """Over all parts of this micro-batch, without gradient: what is summed over a sequence needs it. A collective."""
        return sums if self.split is None else self.split.total(sums)


# what a loss takes and gives: a micro-batch's share of the batch's loss (a sum over tokens whose weights carry the global
# denominator), and metric sums
Loss = Callable[[Vocabulary, MicroBatch], tuple[Tensor, MetricSums]]

# an answer of the vocabulary at each of its positions, without gradient
PerToken = Callable[[Vocabulary], Tensor]


def make_microbatches(
    batch: TrainBatch,
    *,
    data_rank: int,
    data_size: int,
    microbatch_tokens: int,
    alignment: int,
    sequence_alignment: int = 1,
    aggregation: Aggregation = "token_mean",
    device: torch.device | str = "cpu",
    beside: Sequence[TrainBatch] = (),
    attention_length: float = math.inf,
    multiple: int = 1,
) -> list[MicroBatch]:
    """This rank's share of `batch`, in micro-batches of at most `microbatch_tokens` tokens before alignment.

    `alignment` is a micro-batch's, `sequence_alignment` that of each of its sequences, which divides it.

    Every rank computes the same plan, so all get the same number of micro-batches without communicating; ranks that run
    short get micro-batches without a sequence, as do those whose sequences have no tokens. The loss does not depend on the
    plan: weights are global. Batches of as many sequences that are read `beside` this one, one after the other, are cut
    alike, so that none exceeds `microbatch_tokens`: each has to name the others. `attention_length` is that of a sequence whose
    attention takes as long as all else: replicas get as much to do as each other, not as many tokens. There are a
    multiple of `multiple` micro-batches.
    """
    lengths = np.array([[len(s.token_ids) for s in b.sequences] for b in (batch, *beside)]).T
    costs = (lengths * (1 + lengths / attention_length)).sum(axis=1).tolist()
    plans = [_fill_bins(share, lengths, microbatch_tokens) for share in _balance(range(len(batch)), costs, data_size)]
    num_microbatches = -(-max(len(plan) for plan in plans) // multiple) * multiple
    mine = plans[data_rank] + [[] for _ in range(num_microbatches - len(plans[data_rank]))]
    weights = _token_weight(batch, aggregation), _token_weight(batch, "sequence_mean")
    return [_pack(batch, indices, weights, (sequence_alignment, alignment), device) for indices in mine]


def _balance(indices: Sequence[int], costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Costliest first, each to the rank with the least to do."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for index in _largest_first(indices, costs):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return shares


def _fill_bins(indices: Sequence[int], lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """First-fit decreasing; sequences of like length meet, which keeps padded attention dense. `lengths` are [sequences,
    batches], and `capacity` is that of each batch."""
    bins: list[list[int]] = []
    space = np.full((len(indices), lengths.shape[1]), capacity)
    for index in _largest_first(indices, lengths.max(axis=1).tolist()):
        fits = (space[: len(bins)] >= lengths[index]).all(axis=1)
        slot = int(fits.argmax()) if fits.any() else len(bins)
        if slot == len(bins):
            bins.append([])
        bins[slot].append(index)
        space[slot] -= lengths[index]
    return bins


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _largest_first(indices: Sequence[int], sizes: Sequence[float]) -> list[int]:
    return sorted(indices, key=lambda i: (-sizes[i], i))


def _token_weight(batch: TrainBatch, aggregation: Aggregation) -> Callable[[TrainSequence], float]:
    total, count = max(batch.num_valid_tokens, 1), sum(s.share is None for s in batch.sequences)

    def weight(sequence: TrainSequence) -> float:
        if sequence.share is not None:
            return sequence.share
        return 1.0 / total if aggregation == "token_mean" else 1.0 / (count * max(sequence.num_response_tokens, 1))

    return weight


def _pack(
    batch: TrainBatch,
    indices: Sequence[int],
    token_weights: Sequence[Callable[[TrainSequence], float]],
    alignments: tuple[int, int],
    device: torch.device | str,
) -> MicroBatch:
    indices = [i for i in indices if len(batch.sequences[i].token_ids)]
    sequences = [batch.sequences[i] for i in indices]
    lengths = [len(s.token_ids) for s in sequences]
    padded = [_round_up(n, alignments[0]) for n in lengths]
    used = sum(padded)
    total = _round_up(max(used, 1), alignments[1])
    borders = np.cumsum([0, *padded, *([total - used] if total > used else [])])
    ints = np.zeros((3, total), dtype=np.int64)
    names = sorted({name for s in batch.sequences for name in s.extra})
    floats = np.zeros((6 + len(names), total), dtype=np.float32)
    tokens, positions, targets = ints
    mask, *weights, advantages, old_logprobs, rollout_logprobs = floats[:6]
    positions[used:] = np.arange(total - used)
    for sequence, start, length, room in zip(sequences, borders, lengths, padded, strict=False):
        end = start + length
        tokens[start:end] = sequence.token_ids
        positions[start : start + room] = np.arange(room)  # padding comes last, where no token of the sequence sees it
        targets[start : end - 1] = sequence.token_ids[1:]
        predicting = slice(start + sequence.num_prompt_tokens - 1, end - 1)
        mask[predicting] = 1.0
        for row, weight in zip(weights, token_weights, strict=True):
            row[predicting] = weight(sequence)
        advantages[predicting] = sequence.advantage
        if sequence.old_logprobs is not None:
            old_logprobs[predicting] = sequence.old_logprobs
        if sequence.rollout_logprobs is not None:
            rollout_logprobs[predicting] = sequence.rollout_logprobs
        for column, name in zip(floats[6:], names, strict=True):
            if name in sequence.extra:
                column[predicting] = sequence.extra[name]
    int_rows, float_rows = torch.from_numpy(ints).to(device), torch.from_numpy(floats).to(device)
    return MicroBatch(
        sequence_indices=tuple(indices),
        tokens=int_rows[0],
        position_ids=int_rows[1],
        targets=int_rows[2],
        cu_seqlens=torch.tensor(borders, dtype=torch.int32, device=device),
        max_seqlen=int(np.diff(borders).max()),
        loss_mask=float_rows[0],
        loss_weights=float_rows[1],
        sequence_weights=float_rows[2],
        advantages=float_rows[3],
        old_logprobs=float_rows[4],
        rollout_logprobs=float_rows[5],
        extra=dict(zip(names, float_rows[6:], strict=True)),
    )
