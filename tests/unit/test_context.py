"""Context parallelism: every token is one rank's, with its position, target and weights, and what is said of it is put back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

from megatron_reheat.parallel.context import ContextSplit, context_positions, sequence_multiple
from megatron_reheat.parallel.packing import MicroBatch, make_microbatches
from megatron_reheat.types import TrainBatch, TrainSequence

LENGTHS = [9, 3, 14, 5, 30, 4, 11, 1]


def batch() -> TrainBatch:
    generator = np.random.default_rng(1)
    sequences = []
    for i, n in enumerate(LENGTHS):
        prompt = max(1, n // 3)
        columns = {"extra": generator.normal(size=n - prompt).astype(np.float32)}
        logprobs = generator.normal(size=n - prompt).astype(np.float32)
        tokens = generator.integers(1, 99, n).astype(np.int32)
        sequences.append(TrainSequence(tokens, prompt, float(i), logprobs, logprobs + 1, extra=columns))
    return TrainBatch(tuple(sequences))


def packed(size: int, *, tensor: int = 1) -> MicroBatch:
    multiple = sequence_multiple(size)
    options = {"sequence_alignment": multiple, "alignment": multiple * tensor}
    (micro,) = make_microbatches(batch(), data_rank=0, data_size=1, microbatch_tokens=999, **options)
    return micro


def parts(size: int, **options: int) -> list[MicroBatch]:
    return [packed(size, **options).part(rank, size, group=None) for rank in range(size)]  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_sequence_is_split_as_megatron_rotates_it_and_each_rank_has_as_much_to_attend_to(size: int) -> None:
    lengths = [2 * size * n for n in (1, 5, 2)]
    borders = torch.tensor([0, *itertools.accumulate(lengths)])
    split = [context_positions(borders, rank, size) for rank in range(size)]
    assert sorted(torch.cat(split).tolist()) == list(range(sum(lengths)))
    table, work = torch.arange(max(lengths)), set()
    for rank, places in enumerate(split):
        own = places.split([n // size for n in lengths])
        positions = [part - start for part, start in zip(own, borders[:-1], strict=True)]
        for part in positions:
            assert torch.equal(part, _get_thd_freqs_on_this_cp_rank(rank, size, part, table))
        work.add(sum(int(part.sum()) for part in positions))
    assert len(work) == 1


@pytest.mark.parametrize("tensor", [1, 3])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_part_has_its_tokens_positions_targets_and_weights(size: int, tensor: int) -> None:
    """Those that the micro-batch has without context parallelism, and padding that counts nothing."""
    names = ("tokens", "position_ids", "targets", "loss_weights", "sequence_weights", "advantages", "old_logprobs")
    plain, found = packed(1), []
    assert len({len(part.tokens) for part in parts(size, tensor=tensor)}) == 1
    for part in parts(size, tensor=tensor):
        assert len(part.tokens) % (2 * tensor) == 0 and int(part.cu_seqlens[-1]) == len(part.tokens)
        rows = part.at(part.positions)
        owner = torch.searchsorted(part.cu_seqlens.long(), part.positions, right=True) - 1
        columns = [owner, *(getattr(rows, name) for name in names), rows.rollout_logprobs, rows.extra["extra"]]
        found += list(zip(*(column.tolist() for column in columns), strict=True))
    rows = plain.at(plain.positions)
    owner = torch.searchsorted(plain.cu_seqlens.long(), plain.positions, right=True) - 1
    columns = [owner, *(getattr(rows, name) for name in names), rows.rollout_logprobs, rows.extra["extra"]]
    assert sorted(found) == sorted(zip(*(column.tolist() for column in columns), strict=True))
    assert sum(float(part.loss_weights.sum()) for part in parts(size)) == pytest.approx(1.0)


@pytest.mark.parametrize("size", [2, 3])
def test_what_the_parts_say_of_a_response_adds_up_to_it_in_order(size: int) -> None:
    found = {i: np.zeros(s.num_response_tokens, np.float32) for i, s in enumerate(batch().sequences)}
    for part in parts(size):
        assert part.sequence_indices == packed(size).sequence_indices
        for index, (values,) in part.by_sequence(part.targets[part.positions].float()).items():
            found[index] += values
    for i, s in enumerate(batch().sequences):
        assert found[i].tolist() == s.token_ids[s.num_prompt_tokens :].tolist()


def test_a_rank_without_sequences_has_a_part_of_padding() -> None:
    options = {"microbatch_tokens": 99, "sequence_alignment": 4, "alignment": 8}
    (micro,) = make_microbatches(TrainBatch(batch().sequences[:1]), data_rank=1, data_size=2, **options)
    part = micro.part(1, 2, group=None)  # type: ignore[arg-type]
    assert len(part.tokens) == 4 and part.by_sequence(torch.zeros(0)) == {}


def test_the_places_are_the_inverse_of_the_order() -> None:
    split = ContextSplit(packed(3).cu_seqlens, 1, 3, group=None)  # type: ignore[arg-type]
    assert split.order[split.place].tolist() == list(range(len(split.order)))
    assert split.here.tolist() == context_positions(packed(3).cu_seqlens, 1, 3).tolist()
