"""The trainer: one Megatron model, of which this rank has its part of the layout, with score, update and weight export.

Loss contract: a loss closure gets the `Vocabulary` at T positions and the micro-batch, and returns its share of the batch's
loss (a sum whose weights already carry the global denominator) with metric sums. Megatron's own scalings (micro-batch
average, data-parallel average, token count) are switched off here and nowhere else, so a loss is invariant to TP, PP, CP, DP
and micro-batching. Under context parallelism T are the rank's positions of every sequence: a sum over tokens is one over the
ranks' sums, gradients are summed over data x context ranks, and what is summed over a sequence goes through `MicroBatch.total`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_reheat.config import Config
from megatron_reheat.metrics import MetricSums
from megatron_reheat.model.architecture import Architecture
from megatron_reheat.model.backend import choose_backend
from megatron_reheat.model.chunks import ModelChunks
from megatron_reheat.model.data_parallel import PolicyDDP, ddp_config
from megatron_reheat.model.frozen_weights import FrozenWeights
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import HFExporter, load_hf_weights
from megatron_reheat.model.master_weights import MasterWeights, Snapshot
from megatron_reheat.model.outputs import ChunkedLoss, Evaluated, OutputHead, Scored, Scoring, ViewStates, WholeLoss
from megatron_reheat.model.packed_sequences import PackedSequences
from megatron_reheat.model.provider import build_model, check_layout, read_hf_config
from megatron_reheat.parallel.attention import AttentionTerm
from megatron_reheat.parallel.context import sequence_multiple
from megatron_reheat.parallel.packing import Aggregation, Loss, MicroBatch, PerToken, make_microbatches
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.types import FloatArray, Scores, TrainBatch

# the reduced metrics, and the scores where the update makes them -> whether the weights may change
Accept = Callable[[dict[str, float], Scores | None], bool]
# position of the micro-batch, the micro-batch and the model's output -> loss and metric sums
Evaluate = Callable[[int, MicroBatch, Tensor], Evaluated]
NO_COLUMNS: Mapping[str, PerToken] = {}
NO_VIEWS: Mapping[str, TrainBatch] = {}
NO_READERS: Mapping[str, FrozenWeights] = {}


FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class UpdateResult:
    """Metrics of one optimizer step over all ranks, whether the weights changed, and the scores from before if asked for."""

    sums: MetricSums
    applied: bool
    finite: bool
    scores: Scores | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """By name, the same on every rank."""
        return self.sums.reduced()


class Engine:
    """See the module's text. Every method that trains or exports is a collective over all ranks."""

    def __init__(self, config: Config, hf_folder: Path, topology: Topology) -> None:
        self.config = config
        self.topology = topology
        self.hf = read_hf_config(hf_folder)
        check_layout(self.hf, config)
        self.backend = choose_backend(config.model.attention)
        model = build_model(self.hf, config, topology, self.backend)
        load_hf_weights(model, HFReader(hf_folder), topology)
        self.module = model
        self._exporter = HFExporter(
            model,
            topology,
            vocab_size=self.hf.vocab_size,
            bucket_bytes=config.rollout.sync_bucket_mb << 20,
            to_all=config.rollout.mode == "colocated",
        )
        self.head = OutputHead(
            model.last, config, self.hf.vocab_size, topology.tensor_group if topology.tensor_size > 1 else None
        )
        self._wrapped, self.optimizer = self._wrap(model)
        self.masters = MasterWeights(model, self._wrapped, self.optimizer, topology)
        self._forward_backward = get_forward_backward_func()

    # -- what the stages use ---------------------------------------------------------------------------------------

    def score(self, batch: TrainBatch, *, temperature: float, columns: Mapping[str, PerToken] = NO_COLUMNS) -> Scores:
        """Log-probabilities (at `temperature`) and entropies (at 1) of every response token, and `columns`, on every rank."""
        if not len(batch):
            return Scores([], [], {name: [] for name in columns})
        scoring = Scoring(self.head, temperature, columns)
        self.forward(self.microbatches(batch), scoring)
        logprobs, entropies, *further = self._in_order(scoring.scored, len(batch))
        return Scores(logprobs, entropies, dict(zip(columns, further, strict=True)))

    def forward(self, micros: Sequence[MicroBatch], evaluate: Evaluate) -> None:
        """Shows `evaluate` the model's output for each micro-batch, without dropout and gradient, on the last stage."""
        for chunk in self._wrapped:
            chunk.eval()
        with torch.no_grad():
            self._run(micros, evaluate, forward_only=True)

    def update(
        self,
        batch: TrainBatch,
        loss: Loss,
        *,
        lr: float,
        weight_decay: float,
        aggregation: Aggregation = "token_mean",
        whole_sequences: bool = False,
        score: bool = False,
        accept: Accept | None = None,
        views: Mapping[str, TrainBatch] = NO_VIEWS,
        readers: Mapping[str, FrozenWeights] = NO_READERS,
        taps: Sequence[int] = (),
        attention: AttentionTerm | None = None,
    ) -> UpdateResult:
        """One optimizer step on `batch`.

        The loss finds further vocabularies of the same tokens in `micro.readings`, for which the head must be fused
        (`model.fused_head`): under their names those of `views`, which are the same responses in the same order behind other
        prompts, read by one more forward pass each without gradient; and as `layerN` what layer N of `taps`, counted from 1
        and before the last, predicts through the final norm and the head, with gradient. A view may leave sequences out, as
        ones without tokens: it says nothing about their positions, where it predicts anything alike. `readers` are the weights
        that read a view in place of the policy's. `attention` is added to the loss.

        A loss is asked chunk by chunk, as a sum over tokens can be. With `whole_sequences` it sees each micro-batch at once,
        which never splits a sequence; the fused head then makes the logits a second time for their gradient.

        With `score`, the loss is `losses.policy_gradient.surrogate_loss` or one around it, the batch's `old_logprobs` are
        those of this update's own forward pass, and that pass gives the `scores`, at the loss's temperature.

        `accept` sees metrics and scores after the backward pass and before the weights change; when it returns False, or
        when the loss or a gradient is not finite, the gradients are dropped and the weights stay as they are.
        """
        assert self.config.model.fused_head or not (views or taps or attention)
        assert attention is None or self.config.parallel.context == 1  # `reading_problems`
        assert max(taps, default=0) < self.hf.num_hidden_layers  # the last layer's prediction is the policy's
        micros = self.microbatches(batch, aggregation, beside=tuple(views.values()))
        states, heads = self._read_views(views, readers, batch, micros)
        for chunk in self._wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        assert not (whole_sequences and (views or taps or attention))
        scored: list[Scored] | None = [] if score else None
        in_chunks = self.head.is_fused and not whole_sequences
        evaluate: Evaluate = (
            ChunkedLoss(self.head, loss, states, heads, attention, scored)
            if in_chunks
            else WholeLoss(self.head, loss, scored)
        )
        self._tap(tuple(taps), () if attention is None else attention.layers)
        try:
            per_microbatch = self._run(micros, evaluate, forward_only=False)
        finally:
            self._tap((), ())
        sums = self._over_ranks(per_microbatch)
        scores = None
        if scored is not None:
            logprobs, entropies = self._in_order(scored, len(batch))
            scores = Scores(logprobs, entropies)
        finite = not self.topology.any(self._has_non_finite_gradients())
        applied = finite and (accept is None or accept(sums.reduced(), scores))
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_mult", 1.0)
                group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
            _, grad_norm, _ = self.optimizer.step()
            sums.add_mean("optimizer/grad_norm", float(grad_norm), 1)
            sums.add_mean("optimizer/lr", lr, 1)
        return UpdateResult(sums, applied, finite, scores)

    def iter_hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Streams (Hugging Face name, full tensor) to each replica's leader; a collective that every rank drains."""
        return iter(self._exporter)

    def reset_optimizer(self) -> None:
        """Forgets the moments, as at the start of training: stages do not inherit each other's."""
        for optimizer in self.torch_optimizers():
            for state in optimizer.state.values():
                for value in state.values():
                    if torch.is_tensor(value):
                        value.zero_()
            for group in optimizer.param_groups:
                if "step" in group:  # the fused optimizers count per group
                    group["step"] = torch.zeros_like(group["step"]) if torch.is_tensor(group["step"]) else 0

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """A copy of this rank's master weights in host memory, in that of `into` where an earlier one is given up."""
        return self.masters.copy(into)

    def restore(self, snapshot: Snapshot) -> None:
        """Puts master weights and weights back, to the bit; moments stay (see `master_weights`). A collective."""
        self.masters.put_back(snapshot)

    def frozen_weights(self, snapshot: Snapshot) -> FrozenWeights:
        """Those of a snapshot, to read with; the policy's are as before, to the bit. A collective."""
        now = self.snapshot()
        self.restore(snapshot)
        frozen = FrozenWeights(self.module, self.topology)
        self.restore(now)
        return frozen

    def final_norm(self) -> Snapshot:
        """Master weights of the norm before the head, where this rank holds any."""
        return self.masters.copy_of(FINAL_NORM)

    def set_final_norm(self, norm: Snapshot, scale: float) -> None:
        """Makes them `scale` times what they were in `norm`, and with them every logit. A collective."""
        self.masters.put_back({name: values * scale for name, values in norm.items()})

    def torch_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        """The AdamW instances inside Megatron's optimizer."""
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            if getattr(optimizer, "optimizer", None) is not None:
                yield optimizer.optimizer

    @property
    def num_parameters(self) -> int:
        """Of the whole model, without padding and counting a tied embedding once."""
        return Architecture.from_hf(self.hf).num_parameters

    # -- inside ----------------------------------------------------------------------------------------------------

    def _wrap(self, model: ModelChunks) -> tuple[list[PolicyDDP], Any]:
        config, o = self.config, self.config.optimizer
        wrapped = [PolicyDDP(chunk, ddp_config(config, self.topology)) for chunk in model.models]
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=o.lr,
                weight_decay=o.weight_decay,
                adam_beta1=o.beta1,
                adam_beta2=o.beta2,
                adam_eps=o.eps,
                clip_grad=o.grad_clip,
                bf16=model.config.bf16,
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=config.parallel.distributed_optimizer,
            ),
            wrapped,
        )
        model.config.finalize_model_grads_func = _finalize_without_rescaling
        if wrapped[0].ddp_config.overlap_grad_reduce:  # else Megatron's schedule would sum up after every micro-batch
            no_sync = [chunk.no_sync for chunk in wrapped]
            model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        return wrapped, optimizer

    def _tap(self, layers: tuple[int, ...], attention: tuple[int, ...]) -> None:
        for chunk in self.module.models:
            chunk.taps, chunk.attention_taps = layers, attention

    def _read_views(
        self,
        views: Mapping[str, TrainBatch],
        readers: Mapping[str, FrozenWeights],
        batch: TrainBatch,
        micros: Sequence[MicroBatch],
    ) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """By view, for each micro-batch of `batch` its final hidden states at the responses, on the last stage, [] elsewhere;
        and its reader's head, where it has one."""
        states, heads = {}, {}
        for name, view in views.items():
            beside = [batch, *(v for other, v in views.items() if other != name)]
            kept = ViewStates(self.head, batch, micros)
            with readers[name].in_place() if name in readers else nullcontext():
                self.forward(self.microbatches(view, beside=beside), kept)
                head = self.head.frozen_weight() if name in readers else None
            states[name] = kept.states
            if head is not None:
                heads[name] = head
        return states, heads

    def microbatches(
        self, batch: TrainBatch, aggregation: Aggregation = "token_mean", beside: Sequence[TrainBatch] = ()
    ) -> list[MicroBatch]:
        """This rank's share of `batch` on its device, cut as those `beside` it are; see `make_microbatches`.

        Under context parallelism, of each micro-batch this rank's part.
        """
        parallel, topology = self.config.parallel, self.topology
        sequence_alignment = sequence_multiple(parallel.context)
        micros = make_microbatches(
            batch,
            data_rank=topology.data_rank,
            data_size=topology.data_size,
            microbatch_tokens=parallel.microbatch_tokens,
            sequence_alignment=sequence_alignment,
            alignment=sequence_alignment * (parallel.tensor if parallel.sequence_parallel else 1),
            aggregation=aggregation,
            device=topology.device,
            beside=beside,
            attention_length=Architecture.from_hf(self.hf).attention_length,
            # Megatron's interleaved schedule goes through them in groups of as many as there are stages
            multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        )
        if parallel.context == 1:
            return micros
        return [m.part(topology.context_rank, topology.context_size, topology.context_group) for m in micros]

    def _run(self, micros: Sequence[MicroBatch], evaluate: Evaluate, *, forward_only: bool) -> list[MetricSums]:
        """Megatron's pipeline schedule over the micro-batches; metric sums on the last stage, [] elsewhere."""

        def forward_step(iterator: Iterator[tuple[int, MicroBatch]], model: Any) -> tuple[Tensor, Any]:
            index, micro = next(iterator)
            return self._output(model, micro), lambda output: _for_megatron(*evaluate(index, micro, output))

        return self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(enumerate(micros)) for _ in self._wrapped],
            model=self._wrapped,
            num_microbatches=len(micros),
            seq_length=self.config.parallel.microbatch_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _output(self, model: Any, micro: MicroBatch) -> Tensor:
        fp32_output = {"fp32_output": False} if self.module.config.bf16 else {}
        borders = micro.cu_seqlens if micro.split is None else micro.split.cu_seqlens
        packed = PackedSequences.of(
            borders, micro.max_seqlen, micro.position_ids, self.module.last.frequencies, split=micro.split
        )
        return model(micro.tokens[None], micro.position_ids[None], None, packed_seq_params=packed, **fp32_output)

    def _in_order(self, scored: Sequence[Scored], count: int) -> list[list[FloatArray]]:
        """Of all micro-batches of all ranks: for each question, the answers of the `count` sequences in the batch's order."""
        by_index: Scored = {}
        for part in self.topology.gather_from_last_stages(scored):
            for rows in part:
                for index, answers in rows.items():
                    if index in by_index:  # another context rank's tokens of it, which are zero here
                        answers = tuple(a + b for a, b in zip(by_index[index], answers, strict=True))
                    by_index[index] = answers
        return [list(column) for column in zip(*(by_index[i] for i in range(count)), strict=True)]

    def _over_ranks(self, per_microbatch: Sequence[MetricSums]) -> MetricSums:
        mine = MetricSums.merged(per_microbatch)
        return MetricSums.from_wires(self.topology.gather_from_last_stages(mine.to_wire()))

    def _has_non_finite_gradients(self) -> bool:
        buffers = [b for chunk in self._wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        return not all(bool(torch.isfinite(b.grad_data.sum())) for b in buffers)


def _for_megatron(value: Tensor, metrics: MetricSums) -> tuple[Tensor, Tensor, MetricSums]:
    if not torch.isfinite(value):
        metrics.add_sum("optimizer/non_finite_microbatches", 1.0)
    # the count is Megatron's business only when it divides by it, which `_finalize_without_rescaling` prevents
    return value, torch.ones((), dtype=torch.int, device=value.device), metrics


def _finalize_without_rescaling(model: Any, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reductions without its division by the token count: the loss already carries it."""
    finalize_model_grads(model, None, **kwargs)
