from megatron_reheat.losses.tempered_kl import (
    fused_logprobs,
    fused_tempered_kl,
    tempered_kl,
    vocab_entropy,
    vocab_logprobs,
)

__all__ = ["fused_logprobs", "fused_tempered_kl", "tempered_kl", "vocab_entropy", "vocab_logprobs"]
