"""Makes our CPU weight transfer known to vLLM; an entry point of the group `vllm.general_plugins`.

vLLM calls it in every process it starts, so it must be cheap and may be called twice.
"""

from __future__ import annotations

GLOO_BACKEND = "reheat_gloo"


def register() -> None:
    """Under GLOO_BACKEND; the engine's module is imported when vLLM makes one."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if GLOO_BACKEND not in WeightTransferEngineFactory._registry:  # there is no public question, and twice is an error
        WeightTransferEngineFactory.register_engine(
            GLOO_BACKEND, "megatron_reheat.rollout.server.gloo_transfer", "GlooWeightTransfer"
        )
