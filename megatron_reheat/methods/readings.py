"""What a method that reads more than the policy's own prediction asks of the rest of the recipe."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_reheat.config import Config


def reading_problems(config: Config, *, attention: bool = False) -> Iterator[str]:
    """Why this recipe's engine has no `micro.readings` or, with `attention`, does not see how layers attend."""
    method = config.rl.method
    if not config.model.fused_head:
        yield (
            f"rl.method {method} compares predictions chunk by chunk inside the fused head, and model.fused_head=false makes "
            "all logits at once; set model.fused_head=true"
        )
    if attention and config.parallel.context > 1:
        yield (
            f"rl.method {method} compares how layers attend, and with parallel.context {config.parallel.context} no rank has "
            "all keys of a sequence; set parallel.context=1, or leave that term out (rl.options.attention_coef=0)"
        )
    if attention and config.model.recompute == "full":
        yield (
            f"rl.method {method} compares how layers attend, and model.recompute=full throws a layer's queries and keys away "
            "and makes them anew in the backward pass, where the loss no longer sees them; set model.recompute=selective or "
            "none, or leave that term out (rl.options.attention_coef=0)"
        )
