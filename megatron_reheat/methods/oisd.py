"""OISD: an intermediate layer, read through the model's own head, learns from the last one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import Field

from megatron_reheat.config import Config
from megatron_reheat.config_fields import Section
from megatron_reheat.errors import ConfigError
from megatron_reheat.losses.oisd import attention_loss, think_loss
from megatron_reheat.methods.grpo import GRPO, Costs, Tools
from megatron_reheat.methods.readings import reading_problems
from megatron_reheat.parallel.attention import AttentionTerm
from megatron_reheat.parallel.packing import Loss
from megatron_reheat.types import At


class OISD(GRPO):
    """OISD (arXiv 2605.29089). With p = softmax(head(final norm(h_l)) / tau) of layer l, u the same of the last layer L,
    detached, a and b what attention heads of l and of L (detached) do with a few keys, and Ac = clip(A, -c, c):

        L = L_GRPO + think_coef mean_i mean_t Ac JS(p, u) + attention_coef mean_i mean_t Ac mean_h JS(a_h, b_h)

    A positive advantage pulls layer l towards the last one, a negative one pushes it away. Both terms weigh every sequence i
    the same, as the paper writes them, while L_GRPO is a token mean; their gradient reaches the layers up to l (the head and
    the final norm as well, of the first). The second is over a few positions t of a sequence, and its distributions are
    renormalized over a few keys: a recent window, and positions at a stride before it.

    Layers count from 1, which the paper's own choices imply (27 of 28, 31 of 32). The paper does not give tau, c, window,
    stride and the number of queries: the defaults are ours, for responses of a few thousand tokens; c = 1 is one standard
    deviation of the group's rewards. Neither term is corrected for several minibatches or by `rl.tis_cap`. An early layer is
    nearly uniform through the head, so that its JS starts close to ln 2 = 0.693, where it teaches little: watch
    `oisd/think_js`.
    """

    class Options(Section):
        """tau, c and the choice of queries and keys are ours: the paper does not give them."""

        layer: int = Field(default=6, gt=0, description="l, counted from 1; 6 is the paper's for Qwen3-4B and 8B")
        think_coef: float = Field(default=1.0, ge=0, description="of the predictions' term; 0: without")
        think_temperature: float = Field(default=1.0, gt=0, description="tau; divides both predictions' logits")
        attention_coef: float = Field(default=0.1, ge=0, description="of the attention's term; 0: without")
        attention_queries: int = Field(default=32, gt=0, description="positions of a response, evenly spaced")
        attention_window: int = Field(default=64, gt=0, description="keys up to the query itself")
        attention_stride: int = Field(default=64, gt=0, description="between the keys before the window")
        advantage_clip: float = Field(default=1.0, gt=0, description="c")

    options: Options
    # its loss is GRPO's, and more
    loss_keys, scores_in_loss = GRPO.loss_keys, True

    def __init__(self, config: Config, options: Any, tools: Tools) -> None:
        super().__init__(config, options, tools)
        self._last_layer = tools.hf.num_hidden_layers
        if options.layer >= self._last_layer:
            raise ConfigError(
                f"rl.options.layer {options.layer} has to come before the last of the model's {self._last_layer} layers, from "
                "which it learns (they count from 1); lower it"
            )
        self.taps = (options.layer,) if options.think_coef else ()

    @classmethod
    def problems(cls, config: Config, options: Any) -> Iterator[str]:
        yield from super().problems(config, options)
        yield from reading_problems(config, attention=options.attention_coef > 0)
        if not options.think_coef and not options.attention_coef:
            yield "rl.options.think_coef and attention_coef are both 0, which leaves GRPO; raise one, or set rl.method=grpo"

    @classmethod
    def costs(cls, config: Config, options: Any) -> Costs:
        """The attention term's few queries and keys are left out."""
        return Costs(heads=float(options.think_coef > 0))

    def loss(self, at: At) -> Loss:
        o, policy = self.options, super().loss(at)
        if not o.think_coef:
            return policy
        return partial(
            think_loss,
            policy=policy,
            layer=o.layer,
            temperature=o.think_temperature,
            coef=o.think_coef,
            advantage_clip=o.advantage_clip,
        )

    def attention(self) -> AttentionTerm | None:
        o = self.options
        if not o.attention_coef:
            return None
        loss = partial(
            attention_loss,
            layer=o.layer,
            last_layer=self._last_layer,
            coef=o.attention_coef,
            advantage_clip=o.advantage_clip,
            queries=o.attention_queries,
            window=o.attention_window,
            stride=o.attention_stride,
        )
        return AttentionTerm((o.layer, self._last_layer), loss)
