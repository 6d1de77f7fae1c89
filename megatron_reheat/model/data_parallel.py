"""Megatron's data-parallel wrapper of the policy: gradients are summed over the replicas, during the backward pass or after.

With overlap, a bucket of gradients is on its way as soon as the last micro-batch's backward pass has made all of them, and
Megatron's schedule waits for the buckets before it returns: whoever looks at a gradient afterwards sees the sum. A run's first
update finds out how often each parameter is reported and sums up at its end.

The distributed optimizer's other collective, which gathers the new weights, stays where the optimizer's step ends
(`overlap_param_gather` is off). Only the hooks of Megatron's modules would wait for it, in the next forward pass, while
samplers, checkpoints and snapshots read the weights after a step, and the fused head reads its own past the output layer. What
there is to gain is half of a bfloat16 model's gradients in bytes, once a minibatch, and nothing after a step's last.

Nor does Transformer Engine overlap tensor parallelism's collectives with matrix products (`tp_comm_overlap`): its buffers hold
inputs of one size, and micro-batches of packed sequences differ in length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_reheat.config import Config
from megatron_reheat.parallel.topology import Topology


def ddp_config(config: Config, topology: Topology) -> DistributedDataParallelConfig:
    """Megatron's configuration of the wrapper; gradients of bfloat16 weights are summed in float32."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        grad_reduce_in_fp32=config.model.dtype == "bfloat16",
        overlap_grad_reduce=topology.num_replicas > 1 and topology.is_on(config.parallel.overlap_grad_reduce),
    )


class PolicyDDP(DistributedDataParallel):
    """The wrapper of a model whose gradients need not all come from autograd.

    The fused head adds its weight's gradient to `main_grad` itself and gives autograd none (`parallel.head_products`). Autograd
    still comes to that weight after everything that reads it, in a tied model the embedding as well: then its gradient is
    complete, which Megatron's hook, that insists on one from autograd, must not be asked about.
    """

    def __init__(self, model: Any, ddp_config: DistributedDataParallelConfig) -> None:
        wrapped = Float16Module(model.config, model) if model.config.bf16 else model
        super().__init__(model.config, ddp_config, wrapped)

    def _make_backward_post_hook(self, param: Tensor) -> Callable[..., None]:
        take_over = super()._make_backward_post_hook(param)

        def hook(*unused: Any) -> None:
            if self.ddp_config.overlap_grad_reduce and param.grad is None:
                self.param_to_bucket_group[param].register_grad_ready(param, self.force_all_reduce)
            else:
                take_over(*unused)

        return hook
