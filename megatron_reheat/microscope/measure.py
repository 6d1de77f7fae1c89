"""Two policies on the same text, one in memory after the other: A's states are kept on the host, then B is run beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_reheat.microscope.cka import linear_cka
from megatron_reheat.microscope.figures import TokenSummary, positions_of, summarize
from megatron_reheat.microscope.probe import Probe, ProbeSequence
from megatron_reheat.microscope.states import StateReader, States, reading_names, release_memory
from megatron_reheat.microscope.tokens import TokenFigures, compare_tokens

BATCH_TOKENS = 4096  # that a model reads at a time, padding included


class Measured(NamedTuple):
    """`cka` is by reading, None where it was not asked for; `num_cka_tokens` says over how many tokens."""

    tokens: TokenSummary
    cka: dict[str, float | None] | None
    num_cka_tokens: int


def measure(a: Path, b: Path, probe: Probe, cka_tokens: int, say: Callable[[str], None]) -> Measured:
    """
    On the host are kept, in the models' dtype: of A the LM head and the states that it reads, [tokens, H]; of both the states
    behind every layer, [layers + 2, cka_tokens, H], at tokens spread evenly over the probe.

    Args:
        a: a Hugging Face folder that was checked, as is b.
        cka_tokens: at most so many tokens; with 0 there is no CKA, as for models of different depth.
        say: is told what begins.
    """
    num_chosen = min(cka_tokens, probe.num_tokens)
    chosen = [torch.empty(0, dtype=torch.int64)] * len(probe.sequences)
    if num_chosen:
        everywhere = torch.arange(num_chosen) * probe.num_tokens // num_chosen
        chosen = list(_by_sequence(probe, everywhere))

    say("running A")
    reader = StateReader(a)
    head = reader.head.cpu()
    finals, layers_a = [], []
    for states in _states(reader, probe, chosen):
        # a copy of these rows alone, where they are a view of the whole batch
        finals.append(states.final.to("cpu", copy=True))
        layers_a.append([layer.cpu() for layer in states.layers])
    del reader
    release_memory()

    say("running B")
    reader = StateReader(b)
    parts, layers_b = [], []
    head = head.to(reader.device)
    for i, states in enumerate(_states(reader, probe, chosen)):
        targets = torch.tensor(probe.sequences[i].response, device=reader.device)
        parts.append(compare_tokens(finals[i].to(reader.device), head, states.final, reader.head, targets))
        layers_b.append([layer.cpu() for layer in states.layers])
    device = reader.device
    del reader, head
    release_memory()

    lengths = [len(sequence.response) for sequence in probe.sequences]
    summary = summarize(TokenFigures.joined(parts), positions_of(lengths))
    if not num_chosen:
        return Measured(summary, None, 0)
    say("CKA")
    return Measured(summary, _cka_by_reading(layers_a, layers_b, device), num_chosen)


def _by_sequence(probe: Probe, tokens: Tensor) -> Iterator[Tensor]:
    """`tokens` [k] of all responses in ascending order -> for each sequence the rows of its own response."""
    start = 0
    for sequence in probe.sequences:
        end = start + len(sequence.response)
        yield tokens[(start <= tokens) & (tokens < end)] - start
        start = end


def _states(reader: StateReader, probe: Probe, chosen: Sequence[Tensor]) -> Iterator[States]:
    """Of one sequence after the other."""
    for batch in _batches(probe.sequences):
        yield from reader.states(probe.sequences[batch], chosen[batch])


def _batches(sequences: Sequence[ProbeSequence]) -> Iterator[slice]:
    """Neighbours, as many as make BATCH_TOKENS when they are padded to the longest, and at least one."""
    start, longest = 0, 0
    for i, sequence in enumerate(sequences):
        longest = max(longest, len(sequence))
        if i > start and longest * (i + 1 - start) > BATCH_TOKENS:
            yield slice(start, i)
            start, longest = i, len(sequence)
    yield slice(start, len(sequences))


def _cka_by_reading(
    layers_a: list[list[Tensor]], layers_b: list[list[Tensor]], device: torch.device
) -> dict[str, float | None]:
    # a batch without a chosen token has no states
    a, b = ([layers for layers in each if layers] for each in (layers_a, layers_b))
    names = reading_names(len(a[0]) - 2)
    values = {}
    for i, name in enumerate(names):
        x, y = (torch.cat([layers[i] for layers in each]).to(device) for each in (a, b))
        values[name] = linear_cka(x, y)
    return values
