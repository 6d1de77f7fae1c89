"""The trainer: one Megatron model on this rank's part of the layout, with score, update and weight export.

Loss contract: a loss closure gets the `Vocabulary` at T positions and the micro-batch, and returns its share of the batch's
loss (a sum whose weights already carry the global denominator) with metric sums. Megatron's own scalings (micro-batch
average, data-parallel average, token count) are switched off here and nowhere else, so a loss is invariant to TP, PP, DP and
micro-batching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_reheat.config import Config
from megatron_reheat.metrics import MetricSums
from megatron_reheat.model.architecture import Architecture
from megatron_reheat.model.backend import choose_backend
from megatron_reheat.model.head import head_input, head_weight
from megatron_reheat.model.hf_weights import HFExporter, HFReader, load_hf_weights
from megatron_reheat.model.provider import build_model, check_layout, read_hf_config
from megatron_reheat.parallel.packing import Aggregation, MicroBatch, make_microbatches
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.parallel.vocab import VocabHead, VocabLogits, Vocabulary, head_loss
from megatron_reheat.types import FloatArray, TrainBatch

Loss = Callable[[Vocabulary, MicroBatch], tuple[Tensor, MetricSums]]
Accept = Callable[[dict[str, float]], bool]


@dataclass(frozen=True)
class Scores:
    """Per sequence of the batch, [R] float32: log-probabilities at the sampling temperature, entropies at temperature 1."""

    logprobs: list[FloatArray]
    entropies: list[FloatArray]

    @property
    def mean_entropy(self) -> float:
        """Token mean over the batch, in nats."""
        count = sum(len(e) for e in self.entropies)
        return float(sum(e.sum(dtype="float64") for e in self.entropies) / max(count, 1))


@dataclass(frozen=True)
class UpdateResult:
    """Reduced metrics of one optimizer step, and whether the weights changed."""

    metrics: dict[str, float]
    applied: bool
    finite: bool


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
        self._model, self.optimizer = self._wrap(model)
        self._forward_backward = get_forward_backward_func()

    # -- what the stages use ---------------------------------------------------------------------------------------

    def score(self, batch: TrainBatch, *, temperature: float) -> Scores:
        """Log-probabilities (at `temperature`) and entropies (at 1) of every response token, on every rank."""
        scored: list[dict[int, tuple[FloatArray, FloatArray]]] = []

        def keep(vocab: Vocabulary, micro: MicroBatch) -> tuple[Tensor, MetricSums]:
            result = vocab.logprobs(micro.targets, temperature=temperature)
            logprobs, entropies = micro.unpack(result.logprobs), micro.unpack(result.entropy)
            scored.append({i: (logprobs[i], entropies[i]) for i in logprobs})
            return result.logprobs.sum(), MetricSums()

        self._model.eval()
        with torch.no_grad():
            self._run(self._microbatches(batch), keep, forward_only=True)
        by_index: dict[int, tuple[FloatArray, FloatArray]] = {}
        for part in self.topology.gather_from_last_stages(scored):
            for rows in part:
                by_index.update(rows)
        return Scores(
            logprobs=[by_index[i][0] for i in range(len(batch))],
            entropies=[by_index[i][1] for i in range(len(batch))],
        )

    def update(
        self,
        batch: TrainBatch,
        loss: Loss,
        *,
        lr: float,
        weight_decay: float,
        aggregation: Aggregation = "token_mean",
        accept: Accept | None = None,
    ) -> UpdateResult:
        """One optimizer step on `batch`.

        `accept` sees the reduced metrics after the backward pass and before the weights change; when it returns False, or
        when the loss or a gradient is not finite, the gradients are dropped and the weights stay as they are.
        """
        self._model.train()
        self._model.zero_grad_buffer()
        self.optimizer.zero_grad()
        per_microbatch = self._run(self._microbatches(batch, aggregation), loss, forward_only=False)
        metrics = self._reduce(per_microbatch)
        finite = not self.topology.any(self._has_non_finite_gradients())
        applied = finite and (accept is None or accept(metrics))
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_mult", 1.0)
                group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
            _, grad_norm, _ = self.optimizer.step()
            metrics["optimizer/grad_norm"] = float(grad_norm)
            metrics["optimizer/lr"] = lr
        return UpdateResult(metrics, applied, finite)

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

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of this rank's parameters in host memory."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.module.named_parameters()}

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Puts a snapshot back, into the optimizer's main parameters too."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(snapshot[name])
        self.optimizer.reload_model_params()

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

    def _wrap(self, model: Any) -> tuple[DistributedDataParallel, Any]:
        config, o = self.config, self.config.optimizer
        bf16 = model.config.bf16
        distributed = config.parallel.distributed_optimizer
        wrapped = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=bf16),
            Float16Module(model.config, model) if bf16 else model,
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=o.lr,
                weight_decay=o.weight_decay,
                adam_beta1=o.beta1,
                adam_beta2=o.beta2,
                adam_eps=o.eps,
                clip_grad=o.grad_clip,
                bf16=bf16,
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=distributed,
            ),
            [wrapped],
        )
        model.config.finalize_model_grads_func = _finalize_without_rescaling
        return wrapped, optimizer

    def _microbatches(self, batch: TrainBatch, aggregation: Aggregation = "token_mean") -> list[MicroBatch]:
        parallel = self.config.parallel
        return make_microbatches(
            batch,
            data_rank=self.topology.data_rank,
            data_size=self.topology.data_size,
            microbatch_tokens=parallel.microbatch_tokens,
            alignment=parallel.tensor if parallel.sequence_parallel else 1,
            aggregation=aggregation,
            device=self.topology.device,
        )

    def _run(self, micros: Sequence[MicroBatch], loss: Loss, *, forward_only: bool) -> list[MetricSums]:
        """Megatron's pipeline schedule over the micro-batches; metric sums on the last stage, [] elsewhere."""

        def forward_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            micro = next(iterator)
            fp32_output = {"fp32_output": False} if self.module.config.bf16 else {}
            output = model(
                micro.tokens[None],
                micro.position_ids[None],
                None,
                packed_seq_params=_packed_seq_params(micro),
                **fp32_output,
            )
            evaluate = self._score_loss if forward_only else self._train_loss
            return output, partial(self._loss, partial(evaluate, loss, micro))

        return self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(micros),
            model=self._model,
            num_microbatches=len(micros),
            seq_length=self.config.parallel.microbatch_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _loss(
        self, evaluate: Callable[[Tensor], tuple[Tensor, MetricSums]], output: Tensor
    ) -> tuple[Tensor, Tensor, MetricSums]:
        value, metrics = evaluate(output)
        if not torch.isfinite(value):
            metrics.add_sum("optimizer/non_finite_microbatches", 1.0)
        # the count is Megatron's business only when it divides by it, which `_finalize_without_rescaling` prevents
        return value, torch.ones((), dtype=torch.int, device=value.device), metrics

    def _score_loss(self, loss: Loss, micro: MicroBatch, output: Tensor) -> tuple[Tensor, MetricSums]:
        if not self.config.model.fused_head:
            return loss(VocabLogits(output[0], self.hf.vocab_size, self._vocab_group), micro)
        # positions that no loss counts are left out
        vocab = VocabHead(mask=micro.loss_mask.bool(), **self._head_arguments(output))
        return loss(vocab, micro)

    def _train_loss(self, loss: Loss, micro: MicroBatch, output: Tensor) -> tuple[Tensor, MetricSums]:
        if not self.config.model.fused_head:
            return loss(VocabLogits(output[0], self.hf.vocab_size, self._vocab_group, overwrite=True), micro)
        arguments = self._head_arguments(output)
        positions = micro.loss_mask.nonzero()[:, 0]
        counted, metrics = micro.at(positions), MetricSums()

        def chunk_loss(vocab: VocabLogits, rows: slice) -> Tensor:
            value, sums = loss(vocab, counted.at(rows))
            metrics.merge(sums)
            return value

        hidden = arguments.pop("hidden")[positions]
        return head_loss(hidden, loss=chunk_loss, **arguments), metrics

    def _head_arguments(self, output: Tensor) -> dict[str, Any]:
        return {
            "hidden": head_input(output, sequence_parallel=self.config.parallel.sequence_parallel),
            "weight": head_weight(self.module),
            "vocab_size": self.hf.vocab_size,
            "group": self._vocab_group,
            "chunk_tokens": self.config.model.head_chunk_tokens,
        }

    @property
    def _vocab_group(self) -> Any:
        return self.topology.tensor_group if self.topology.tensor_size > 1 else None

    def _reduce(self, per_microbatch: Sequence[MetricSums]) -> dict[str, float]:
        mine = MetricSums()
        for metrics in per_microbatch:
            mine.merge(metrics)
        total = MetricSums()
        for wire in self.topology.gather_from_last_stages(mine.to_wire()):
            total.merge(MetricSums.from_wire(wire))
        return total.reduced()

    def _has_non_finite_gradients(self) -> bool:
        buffers = (*self._model.buffers, *self._model.expert_parallel_buffers)
        return not all(bool(torch.isfinite(b.grad_data.sum())) for b in buffers)


def _finalize_without_rescaling(model: Any, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reductions without its division by the token count: the loss already carries it."""
    finalize_model_grads(model, None, **kwargs)


def _packed_seq_params(micro: MicroBatch) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=micro.cu_seqlens,
        cu_seqlens_kv=micro.cu_seqlens,
        max_seqlen_q=micro.max_seqlen,
        max_seqlen_kv=micro.max_seqlen,
    )
