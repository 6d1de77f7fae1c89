"""What a forward pass of the engine does with each micro-batch's output: through the LM head, to a loss and metric sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_reheat.config import Config
from megatron_reheat.metrics import MetricSums
from megatron_reheat.model.head import HeadlessGPTModel, head_input, head_weight
from megatron_reheat.parallel.attention import Attention, AttentionTerm
from megatron_reheat.parallel.head_loss import ChunkLoss, head_loss
from megatron_reheat.parallel.packing import Loss, MicroBatch, PerToken
from megatron_reheat.parallel.vocab import VocabHead, VocabLogits, Vocabulary
from megatron_reheat.types import FloatArray, TrainBatch

# per sequence of a micro-batch, by its place in the batch: an answer for each of its response tokens, for each question
Scored = dict[int, tuple[FloatArray, ...]]
Evaluated = tuple[Tensor, MetricSums]


@dataclass(frozen=True)
class OutputHead:
    """The LM head behind the model's output, which is logits [1, T, V/TP] already where the head is not fused."""

    module: HeadlessGPTModel | Any
    config: Config
    vocab_size: int
    group: dist.ProcessGroup | None

    @property
    def is_fused(self) -> bool:
        """Whether the output is hidden states, to which the head is applied here."""
        return self.config.model.fused_head

    def hidden(self, output: Tensor) -> Tensor:
        """[T, H] what the fused head is applied to."""
        return head_input(output, sequence_parallel=self.config.parallel.sequence_parallel)

    def vocabulary(self, micro: MicroBatch, output: Tensor) -> Vocabulary:
        """At all T positions at once; the fused head leaves those out that no loss counts."""
        if not self.is_fused:
            return VocabLogits(output[0], self.vocab_size, self.group, overwrite=True)
        return VocabHead(self.hidden(output), mask=micro.loss_mask.bool(), **self._weight())

    def sum_of(self, loss: ChunkLoss, hiddens: Sequence[Tensor], other_weights: Mapping[int, Tensor]) -> Tensor:
        """Of a loss that is asked chunk by chunk (`head_loss`)."""
        return head_loss(hiddens, loss=loss, other_weights=other_weights, **self._weight())

    def frozen_weight(self) -> Tensor | None:
        """A copy of the head's weight as it is now, [V/TP, H]; None on other stages than the last."""
        return head_weight(self.module).detach().clone() if self.module.post_process else None

    def _weight(self) -> dict[str, Any]:
        return {
            "weight": head_weight(self.module),
            "vocab_size": self.vocab_size,
            "group": self.group,
            "chunk_tokens": self.config.model.head_chunk_tokens,
        }


@dataclass(frozen=True)
class WholeLoss:
    """A loss that sees each micro-batch at once, which never splits a sequence; any loss where the head is not fused.

    What the pass says of the tokens' log-probabilities and entropies is kept in `scored`, if asked for.
    """

    head: OutputHead
    loss: Loss
    scored: list[Scored] | None = None

    def __call__(self, index: int, micro: MicroBatch, output: Tensor) -> Evaluated:
        said = _Said(self.scored)
        evaluated = self.loss(self.head.vocabulary(micro, output), said.of(micro))
        said.keep(micro, at=micro.positions)
        return evaluated


@dataclass(frozen=True)
class ChunkedLoss:
    """A loss that is a sum over tokens, of the fused head, and is asked for some of them at a time.

    It finds what it compares the policy with in `micro.readings`: what the module's taps predict, and the views, whose hidden
    states `views` has by name for each micro-batch (`ViewStates`), and `heads` their head's weight where it is another one.
    `attention` is added to it; `scored` is as for `WholeLoss`.
    """

    head: OutputHead
    loss: Loss
    views: Mapping[str, Sequence[Tensor]]
    heads: Mapping[str, Tensor]
    attention: AttentionTerm | None
    scored: list[Scored] | None

    def __call__(self, index: int, micro: MicroBatch, output: Tensor) -> Evaluated:
        said, metrics = _Said(self.scored), MetricSums()
        counted = said.of(micro.at(micro.positions))
        taps = sorted(self.head.module.taps)
        # the policy's own, then the taps', then the views'
        trained = [self.head.hidden(part)[micro.positions] for part in output.chunk(1 + len(taps))]
        hiddens = [*trained, *(states[index] for states in self.views.values())]
        names = [*(f"layer{layer}" for layer in taps), *self.views]
        weights = {1 + i: self.heads[name] for i, name in enumerate(names) if name in self.heads}

        def chunk_loss(vocabs: Sequence[VocabLogits], rows: slice) -> Tensor:
            own, *others = vocabs
            readings = dict(zip(names, others, strict=True))
            value, sums = self.loss(own, replace(counted.at(rows), readings=readings))
            metrics.merge(sums)
            return value

        value = self.head.sum_of(chunk_loss, hiddens, weights)
        said.keep(micro)
        if self.attention is None:
            return value, metrics
        term, sums = self.attention.loss(self._attended(), micro)
        metrics.merge(sums)
        return value + term, metrics

    def _attended(self) -> dict[int, Attention]:
        module = self.head.module
        attended, module.attended = module.attended, {}
        return {n: Attention(queries, keys, self.head.group) for n, (queries, keys) in attended.items()}


@dataclass(frozen=True)
class _Said:
    """Log-probabilities and entropies of one micro-batch, as its loss reads them off, for `scored`; None wants none."""

    scored: list[Scored] | None
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def of(self, micro: MicroBatch) -> MicroBatch:
        """What the loss gets, which then says them (`MicroBatch.scored`)."""
        return micro if self.scored is None else replace(micro, keep=lambda *part: self.parts.append(part))

    def keep(self, micro: MicroBatch, at: Tensor | slice = slice(None)) -> None:
        """All is said; `at` are the places of the response tokens in it."""
        if self.scored is not None:
            columns = [torch.cat(column)[at] for column in zip(*self.parts, strict=True)]
            self.scored.append(micro.by_sequence(*columns) if columns else {})


@dataclass(frozen=True)
class Scoring:
    """Log-probabilities at `temperature`, entropies at 1 and the answers to `columns`, of each response token, in `scored`."""

    head: OutputHead
    temperature: float
    columns: Mapping[str, PerToken]
    scored: list[Scored] = field(default_factory=list)

    def __call__(self, index: int, micro: MicroBatch, output: Tensor) -> Evaluated:
        vocab = self.head.vocabulary(micro, output)
        result = vocab.logprobs(micro.targets, temperature=self.temperature)
        answers = (result.logprobs, result.entropy, *(ask(vocab) for ask in self.columns.values()))
        self.scored.append(micro.by_sequence(*(answer[micro.positions] for answer in answers)))
        return result.logprobs.sum(), MetricSums()


@dataclass(frozen=True)
class ViewStates:
    """Hidden states [R, H] of a view at its responses, in `states`, one for each of the `micros` that they are read beside.

    Zero for sequences of `batch` that the view leaves out, so that rows agree with those of the micro-batch; only at the tokens
    that are in it, where context parallelism has split it.
    """

    head: OutputHead
    batch: TrainBatch
    micros: Sequence[MicroBatch]
    states: list[Tensor] = field(default_factory=list)

    def __call__(self, index: int, micro: MicroBatch, output: Tensor) -> Evaluated:
        beside, hidden = self.micros[index], self.head.hidden(output)
        wanted = beside.sequence_indices
        if micro.whole is not None and micro.split is not None:
            hidden, micro = micro.split.whole(hidden), micro.whole
        read = hidden[micro.positions]
        if wanted != micro.sequence_indices:
            lengths = torch.tensor([self.batch.sequences[i].num_response_tokens for i in wanted])
            is_read = torch.tensor([i in micro.sequence_indices for i in wanted]).repeat_interleave(lengths)
            rows = is_read.nonzero()[:, 0].to(read.device)
            read = read.new_zeros(len(is_read), read.size(1)).index_copy(0, rows, read)
        if beside.whole is not None and beside.split is not None:
            # behind another prompt, other ranks have a response's tokens
            here = beside.split.here[beside.positions]
            read = read[torch.searchsorted(beside.whole.positions, here)]
        self.states.append(read)
        return read.new_zeros(()), MetricSums()
