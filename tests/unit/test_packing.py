"""Packing: nothing lost, nothing twice, weights global, results put back where they belong."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_reheat.parallel.packing import make_microbatches
from megatron_reheat.types import TrainBatch, TrainSequence


def _batch(lengths, prompt=2) -> TrainBatch:
    generator = np.random.default_rng(1)
    return TrainBatch(
        tuple(
            TrainSequence(
                generator.integers(0, 99, n).astype(np.int32),
                prompt,
                advantage=float(i),
                rollout_logprobs=np.full(n - prompt, -i, np.float32),
            )
            for i, n in enumerate(lengths)
        )
    )


LENGTHS = [9, 3, 14, 5, 5, 30, 4, 11]


@pytest.mark.parametrize("data_size", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("capacity", [30, 47, 1000])
@pytest.mark.parametrize("alignment", [1, 4])
def test_every_sequence_is_packed_once_and_ranks_agree_on_the_count(data_size, capacity, alignment):
    batch = _batch(LENGTHS)
    shares = [
        make_microbatches(batch, data_rank=r, data_size=data_size, microbatch_tokens=capacity, alignment=alignment)
        for r in range(data_size)
    ]
    assert len({len(share) for share in shares}) == 1
    micros = [m for share in shares for m in share]
    assert sorted(i for m in micros for i in m.sequence_indices) == list(range(len(batch)))
    assert sum(float(m.loss_weights.sum()) for m in micros) == pytest.approx(1.0)
    assert sum(int(m.loss_mask.sum()) for m in micros) == batch.num_valid_tokens
    for m in micros:
        assert len(m.tokens) % alignment == 0 and int(m.cu_seqlens[-1]) == len(m.tokens)
        assert sum(len(batch.sequences[i].token_ids) for i in m.sequence_indices) <= capacity


def test_what_has_no_tokens_is_left_out_and_planned_like_what_it_stands_for():
    batch = _batch(LENGTHS)
    view = TrainBatch(tuple(s.left_out() if i % 3 else s for i, s in enumerate(batch.sequences)))
    options = {"data_size": 3, "microbatch_tokens": 30, "alignment": 4}
    for rank in range(3):
        own = make_microbatches(batch, data_rank=rank, beside=[view], **options)
        read = make_microbatches(view, data_rank=rank, beside=[batch], **options)
        for ours, theirs in zip(own, read, strict=True):
            assert theirs.sequence_indices == tuple(i for i in ours.sequence_indices if i % 3 == 0)
            length = sum(LENGTHS[i] for i in theirs.sequence_indices)
            assert len(theirs.tokens) == max(-(-length // 4), 1) * 4 == int(theirs.cu_seqlens[-1])
            kept = [batch.sequences[i].token_ids for i in theirs.sequence_indices]
            assert theirs.tokens[:length].tolist() == np.concatenate([*kept, []]).tolist()


def test_batches_that_are_read_one_after_the_other_share_a_plan_and_not_its_space():
    batch = _batch([10, 10, 10, 10])
    longer = _batch([30, 30, 10, 10])
    view = TrainBatch((*longer.sequences[:2], *(s.left_out() for s in longer.sequences[2:])))
    options = {"data_rank": 0, "data_size": 1, "microbatch_tokens": 60, "alignment": 1}
    (own,), (read,) = (make_microbatches(a, beside=[b], **options) for a, b in ((batch, view), (view, batch)))
    assert (own.sequence_indices, read.sequence_indices) == ((0, 1, 2, 3), (0, 1))
    assert (len(own.tokens), len(read.tokens)) == (40, 60)
    cut = make_microbatches(batch, beside=[longer], **options)
    assert [m.sequence_indices for m in cut] == [(0, 1), (2, 3)]


def test_positions_targets_and_masks_of_a_sequence():
    batch = _batch([5, 4])
    (micro,) = make_microbatches(batch, data_rank=0, data_size=1, microbatch_tokens=99, alignment=4)
    first = batch.sequences[0]
    assert micro.sequence_indices == (0, 1)
    assert micro.tokens[:5].tolist() == first.token_ids.tolist()
    assert micro.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert micro.targets[:4].tolist() == first.token_ids[1:].tolist()
    assert micro.loss_mask.tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    assert micro.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert micro.advantages[6:8].tolist() == [1.0, 1.0]
    assert micro.rollout_logprobs[6:8].tolist() == [-1.0, -1.0]
    assert micro.max_seqlen == 5


def test_unpack_returns_response_values_by_sequence():
    batch = _batch(LENGTHS)
    micros = make_microbatches(batch, data_rank=0, data_size=1, microbatch_tokens=40, alignment=1)
    found = {}
    for micro in micros:
        rows = micro.by_sequence(micro.targets[micro.loss_mask.bool()].float())
        found.update({index: values for index, (values,) in rows.items()})
    for i, s in enumerate(batch.sequences):
        assert found[i].tolist() == s.token_ids[s.num_prompt_tokens :].tolist()


@pytest.mark.parametrize(("multiple", "count"), [(1, 3), (2, 4), (3, 3), (4, 4)])
def test_every_rank_fills_up_to_a_multiple_with_empty_micro_batches(multiple, count):
    options = {"data_size": 2, "microbatch_tokens": 9, "alignment": 1, "multiple": multiple}
    shares = [make_microbatches(_batch([9, 8, 7, 6, 5]), data_rank=rank, **options) for rank in range(2)]
    assert [len(share) for share in shares] == [count, count]
    micros = [micro for share in shares for micro in share]
    assert sorted(i for micro in micros for i in micro.sequence_indices) == [0, 1, 2, 3, 4]
    assert sum(float(micro.loss_weights.sum()) for micro in micros) == pytest.approx(1.0)


def test_a_rank_without_sequences_gets_an_empty_micro_batch():
    micros = make_microbatches(_batch([6]), data_rank=1, data_size=2, microbatch_tokens=99, alignment=2)
    assert len(micros) == 1 and micros[0].sequence_indices == ()
    assert float(micros[0].loss_weights.sum()) == 0 and len(micros[0].tokens) == 2
    assert micros[0].by_sequence(torch.zeros(0)) == {}


def test_sequence_mean_gives_every_response_the_same_weight():
    batch = _batch([10, 4])
    (micro,) = make_microbatches(
        batch, data_rank=0, data_size=1, microbatch_tokens=99, alignment=1, aggregation="sequence_mean"
    )
    assert micro.loss_weights[:10].sum().item() == pytest.approx(0.5)
    assert micro.loss_weights[10:].sum().item() == pytest.approx(0.5)
    (other,) = make_microbatches(batch, data_rank=0, data_size=1, microbatch_tokens=99, alignment=1)
    assert torch.equal(other.sequence_weights, micro.loss_weights)  # whatever the aggregation is
    assert torch.equal(micro.at(slice(9, 12)).sequence_weights, micro.loss_weights[9:12])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_a_share_of_its_own_leaves_the_others_theirs_and_weighs_the_same_over_any_minibatches(aggregation):
    even, share = _batch([10, 4, 7, 5]).sequences, 0.01
    own = [replace(s, share=share) for s in _batch([6, 8, 9]).sequences]
    whole = TrainBatch((even[0], own[0], *even[1:], *own[1:]))

    def weights(batch: TrainBatch) -> dict[bool, float]:
        """Of the even sequences together, and of the others."""
        micros = make_microbatches(
            batch, data_rank=0, data_size=1, microbatch_tokens=99, alignment=1, aggregation=aggregation
        )
        found = {False: 0.0, True: 0.0}
        for micro in micros:
            for index, (values,) in micro.by_sequence(micro.loss_weights[micro.loss_mask.bool()]).items():
                found[batch.sequences[index].share is not None] += float(values.sum())
        return found

    expected = share * sum(s.num_response_tokens for s in own)
    assert weights(whole) == {False: pytest.approx(1.0), True: pytest.approx(expected)}
    cuts = whole.minibatches(2)
    assert [len(cut) for cut in cuts] == [4, 3]  # two each, and what has a share of its own dealt out
    of_cuts = [weights(cut) for cut in cuts]
    assert [w[False] for w in of_cuts] == [pytest.approx(1.0)] * 2
    assert sum(w[True] for w in of_cuts) / 2 == pytest.approx(expected)


def test_replicas_get_as_much_work_as_each_other_not_as_many_tokens():
    """Attention of a long sequence is work that its tokens do not show."""
    batch, limit = _batch([2000, *[100] * 60]), 500.0

    def work(attention_length: float) -> list[float]:
        micros = [
            make_microbatches(
                batch, data_rank=r, data_size=2, microbatch_tokens=4096, alignment=1, attention_length=attention_length
            )
            for r in (0, 1)
        ]
        lengths = [[len(batch.sequences[i].token_ids) for m in own for i in m.sequence_indices] for own in micros]
        assert sorted(n for own in lengths for n in own) == sorted(len(s.token_ids) for s in batch.sequences)
        return [sum(n * (1 + n / limit) for n in own) for own in lengths]

    by_tokens, by_work = work(math.inf), work(limit)
    # the long one is more than half of the work, and less than half of the tokens
    assert max(by_work) == 2000 * (1 + 2000 / limit) < max(by_tokens)
