"""GSPO against its sequence form, written out in float64; whole sequences are needed, and asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_reheat.errors import ConfigError
from megatron_reheat.losses.surrogates import sequence_clipped
from megatron_reheat.parallel.packing import make_microbatches
from tests.unit.methods.batches import check, columns, make_case, make_method, run

RL = {"aggregation": "sequence_mean"}


@pytest.mark.parametrize("clip", [(3e-4, 4e-4), (0.05, 0.05), (0.9, 9.0)])
def test_value_and_gradient_are_those_of_the_sequence_form(clip):
    case = make_case()
    method = make_method("gspo", {"clip_low": clip[0], "clip_high": clip[1]}, **RL)
    loss, gradient, metrics, _ = run(method, case)
    dense, rows = case.logprobs()
    total, clipped, deviation = torch.zeros((), dtype=torch.float64), [0, 0], []
    for row, (old, _, advantage) in zip(rows, columns(case), strict=True):
        ratio = (row.sum() - old.sum()).div(len(row)).exp()
        bounded = ratio.clamp(1 - clip[0], 1 + clip[1])
        total = total - torch.minimum(ratio * advantage, bounded * advantage) / len(rows)
        is_clipped = bool(bounded * advantage < ratio * advantage)
        clipped[advantage < 0] += len(row) * is_clipped
        deviation += [abs(ratio.item() - 1)] * len(row)
    check(loss, gradient, total, dense)
    assert metrics["gspo/clip_high_fraction"] == pytest.approx(clipped[0] / len(deviation))
    assert metrics["gspo/clip_low_fraction"] == pytest.approx(clipped[1] / len(deviation))
    assert metrics["gspo/ratio_deviation"] == pytest.approx(np.mean(deviation), rel=1e-4)
    if clip == (0.9, 9.0):
        assert sum(clipped) == 0
    else:
        assert 0 < sum(clipped) < len(deviation)


@pytest.mark.parametrize("cap", [1.0, 9.0])
def test_a_response_counts_by_how_far_its_sampler_is_from_the_old_policy(cap):
    case = make_case()
    loss, gradient, metrics, _ = run(
        make_method("gspo", {"clip_low": 0.05, "clip_high": 0.05}, **RL, tis_cap=cap), case
    )
    dense, rows = case.logprobs()
    total, truncated = torch.zeros((), dtype=torch.float64), []
    for row, (old, sampled, advantage) in zip(rows, columns(case), strict=True):
        ratio, weight = ((a.sum() - b.sum()).div(len(row)).exp() for a, b in ((row, old), (old, sampled)))
        truncated += [weight.item() > cap] * len(row)
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)
        total = total - weight.clamp_max(cap) * surrogate / len(rows)
    check(loss, gradient, total, dense)
    assert metrics["policy/tis_truncated_fraction"] == pytest.approx(np.mean(truncated))
    assert (0 < sum(truncated) < len(truncated)) == (cap == 1.0)


def test_a_part_of_a_micro_batch_is_no_whole_sequence():
    case = make_case()
    (micro,) = make_microbatches(case.batch, data_rank=0, data_size=1, microbatch_tokens=1000, alignment=1)
    assert make_method("gspo", **RL).whole_sequences and not make_method("grpo").whole_sequences
    part = micro.at(slice(0, 9))
    with pytest.raises(AssertionError, match="whole sequences"):
        sequence_clipped(torch.zeros(9), part, clip_low=0.1, clip_high=0.1)


@pytest.mark.parametrize(
    ("rl", "says"),
    [({}, r"set rl\.aggregation=sequence_mean"), ({**RL, "dual_clip": 0.5}, r"rl\.dual_clip")],
)
def test_what_makes_no_sense_beside_it_is_refused(rl, says):
    with pytest.raises(ConfigError, match=says):
        make_method("gspo", **rl)
