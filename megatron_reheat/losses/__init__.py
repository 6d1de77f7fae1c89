from megatron_reheat.losses.tempered_kl import tempered_kl, vocab_entropy, vocab_logprobs

__all__ = ["tempered_kl", "vocab_entropy", "vocab_logprobs"]
