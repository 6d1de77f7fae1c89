"""What a run needs from disk, read and checked against each other before a process group, engine or model is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_reheat.config import Config
from megatron_reheat.data.prompts import PromptCursor, PromptDataset, check_vocabulary, load_prompts
from megatron_reheat.data.tokenizer import read_tokenizer, stop_token_ids
from megatron_reheat.errors import ConfigError
from megatron_reheat.model.checkpoint import latest_checkpoint, read_state
from megatron_reheat.model.hf_weights import HFReader, check_weights
from megatron_reheat.model.provider import check_layout, read_hf_config, resolve_hf_folder
from megatron_reheat.rollout.vllm_version import require_vllm
from megatron_reheat.run_folder import RunFolder


@dataclass(frozen=True)
class Inputs:
    """`source` is the checkpoint to start from, None at the very start; `forked` tells that it is another run's."""

    hf_folder: Path
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptDataset
    eval_prompts: PromptDataset | None
    stop_token_ids: tuple[int, ...]
    max_model_len: int
    source: Path | None
    forked: bool

    def cursors(self, config: Config) -> tuple[PromptCursor, PromptCursor]:
        """Where RL (and reheating) and the warm start begin in the prompts; each has an order of its own."""
        seed, shuffle = config.run.seed, config.data.shuffle
        return (
            PromptCursor(self.prompts, seed=seed, shuffle=shuffle),
            PromptCursor(self.prompts, seed=seed + 1, shuffle=shuffle),
        )


def read_inputs(config: Config) -> Inputs:
    """Model folder, tokenizer, data and the checkpoint to start from. The same on every rank; no collective.

    Raises:
        ConfigError: naming the key or file to change.
        ReheatError: the checkpoint is incomplete.
    """
    require_vllm()
    source, forked = _find_checkpoint(config)
    hf_folder = resolve_hf_folder(config.model)
    hf = read_hf_config(hf_folder)
    check_layout(hf, config)
    check_weights(hf, HFReader(hf_folder))
    max_model_len = context_length(config, hf.max_position_embeddings)
    tokenizer = read_tokenizer(hf_folder)
    check_vocabulary(tokenizer, hf.vocab_size)
    stops = stop_token_ids(hf, tokenizer, hf_folder)
    prompts = load_prompts(config.data, tokenizer, reward_kind=config.reward.kind)
    eval_prompts = None
    if config.eval.data is not None:
        held_out = load_prompts(config.eval.data, tokenizer, reward_kind=config.reward.kind)
        eval_prompts = held_out.without(prompts)
    inputs = Inputs(hf_folder, tokenizer, prompts, eval_prompts, stops, max_model_len, source, forked)
    _check_place_in_data(config, inputs)
    return inputs


def _find_checkpoint(config: Config) -> tuple[Path | None, bool]:
    """The newest state there is: the run's own, else that of the run it forks from."""
    own = latest_checkpoint(RunFolder(config.run.path).checkpoints)
    fork = config.run.fork_from
    if own is not None or fork is None:
        return own, False
    source = latest_checkpoint(RunFolder(Path(fork)).checkpoints)
    if source is None:
        state = "has no complete checkpoint under checkpoints/" if Path(fork).is_dir() else "does not exist"
        raise ConfigError(f"run.fork_from: {fork} {state}; name the folder of a run that has saved one")
    return source, True


def _check_place_in_data(config: Config, inputs: Inputs) -> None:
    """Refuses a checkpoint written over other data now, not after the model is built."""
    if inputs.source is None:
        return
    state = read_state(inputs.source)
    for cursor, key in zip(inputs.cursors(config), ("cursor", "sft_cursor"), strict=True):
        if state[key] is not None:
            cursor.load_state(state[key])


def context_length(config: Config, model_limit: int) -> int:
    """Longest prompt plus longest response, which the engine's context must hold."""
    train = config.data.max_prompt_tokens
    sequences = {"data.max_prompt_tokens + rollout.max_tokens": train + config.rollout.max_tokens}
    if config.controller.action == "reheat":
        sequences["data.max_prompt_tokens + reheat.max_tokens"] = train + config.reheat.max_tokens
    if config.eval.data is not None:
        longest = config.eval.data.max_prompt_tokens + config.eval.max_tokens
        sequences["eval.data.max_prompt_tokens + eval.max_tokens"] = longest
    keys, needed = max(sequences.items(), key=lambda item: item[1])
    chosen = config.rollout.max_model_len
    if chosen is not None and chosen > model_limit:
        raise ConfigError(
            f"rollout.max_model_len {chosen} exceeds the model's context of {model_limit} tokens "
            f"(max_position_embeddings); lower it"
        )
    if needed > (chosen or model_limit):
        whose = "rollout.max_model_len" if chosen else "the model's context (max_position_embeddings)"
        raise ConfigError(f"{keys} = {needed} tokens exceeds {whose}, {chosen or model_limit}; lower one of them")
    return chosen or needed
