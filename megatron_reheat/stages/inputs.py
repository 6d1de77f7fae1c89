"""What a run needs from disk, read and checked against each other before a process group, engine or model is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_reheat.checkpoint_folder import latest_checkpoint
from megatron_reheat.config import Config, ModelConfig
from megatron_reheat.config_data import eval_place
from megatron_reheat.data.mixture import RunPrompts, mixed
from megatron_reheat.data.prompts import PromptCursor, PromptDataset, check_vocabulary, load_prompts
from megatron_reheat.data.responses import response_text, response_tokens
from megatron_reheat.data.tokenizer import end_token_id, read_tokenizer, stop_token_ids
from megatron_reheat.errors import ConfigError
from megatron_reheat.files import problem_of_folder
from megatron_reheat.methods import choose_method
from megatron_reheat.methods.grpo import GRPO, Tools
from megatron_reheat.model.hf_reader import HFReader
from megatron_reheat.model.hf_weights import read_model_folder, saved_dtype
from megatron_reheat.model.provider import check_layout, resolve_hf_folder
from megatron_reheat.parallel.topology import Topology
from megatron_reheat.rewards.graders import check_reward
from megatron_reheat.rollout.vllm_version import require_vllm
from megatron_reheat.run_folder import RunFolder
from megatron_reheat.stages.run_state import other_version, read_run_state
from megatron_reheat.types import Prompt, TokenArray


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder whose files agree with each other, and the tokens that end a response."""

    path: Path
    hf: Any
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class FrozenModel:
    """A model of `rl.samplers`, sampled in the dtype that it was saved in. `notes` tell how it differs from the policy."""

    folder: ModelFolder
    dtype: str
    max_model_len: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """`source` is the checkpoint to start from, None at the very start; `forked` tells that it is another run's.

    `stop_token_ids` are all tokens that end a response. `today` is the date that chat templates print: that of the run's
    start, kept in its checkpoints. `encode` turns a response's text into its tokens, the end included, and `decode` takes
    tokens for text as they are graded. `held_out` is what is evaluated on, by name as in `EvalConfig.sets`. `frozen` are the
    models of `rl.samplers`.
    """

    hf_folder: Path
    tokenizer: PreTrainedTokenizerBase
    prompts: RunPrompts
    held_out: Mapping[str, PromptDataset]
    stop_token_ids: tuple[int, ...]
    max_model_len: int
    source: Path | None
    forked: bool
    today: date
    method: GRPO
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    frozen: Mapping[str, FrozenModel]

    def cursors(self, config: Config) -> tuple[PromptCursor, PromptCursor]:
        """Where RL (and reheating) and the warm start begin in the prompts; each has an order of its own."""
        seed, shuffle = config.run.seed, config.data.shuffle
        return (
            PromptCursor(self.prompts, seed=seed, shuffle=shuffle),
            PromptCursor(self.prompts, seed=seed + 1, shuffle=shuffle),
        )

    def describe(self) -> list[str]:
        """What the run's log tells of its data and of how frozen models differ from the policy, a line each."""
        lines = [line for data in (self.prompts, *self.held_out.values()) for line in data.describe()]
        return [*lines, *(note for model in self.frozen.values() for note in model.notes), *self.method.describe()]


def read_model(config: ModelConfig, *, chat: bool) -> ModelFolder:
    """The model's folder, read and checked as far as can be without loading its weights; a hub name is downloaded.

    Args:
        chat: responses are turns of a conversation (`speaks_in_turns`).

    Raises:
        ConfigError: naming the file, key or tensor at fault.
    """
    folder = resolve_hf_folder(config)
    hf = read_model_folder(folder)
    tokenizer = read_tokenizer(folder)
    check_vocabulary(tokenizer, hf.vocab_size)
    return ModelFolder(folder, hf, tokenizer, stop_token_ids(hf, tokenizer, folder, chat=chat))


def speaks_in_turns(config: Config) -> bool:
    """Whether any of the run's prompts go through the chat template."""
    return any(data.template == "chat" for data in (config.data, *config.eval.sets.values()))


def read_inputs(config: Config, today: date | None = None) -> Inputs:
    """Model folder, tokenizer, data and the checkpoint to start from. The same on every rank; no collective.

    `today` is the date of a run that starts now, by default this day's; see `agree_on_date`.

    Raises:
        ConfigError: naming the key or file to change.
        ReheatError: the checkpoint is incomplete.
    """
    require_vllm()
    choice = choose_method(config)
    check_reward(config.reward)
    source, forked = _find_checkpoint(config)
    today = _saved_date(source) or today or date.today()
    model = read_model(config.model, chat=speaks_in_turns(config))
    check_layout(model.hf, config)
    max_model_len = context_length(config, model.hf.max_position_embeddings)
    tokenizer = model.tokenizer
    load = partial(load_prompts, tokenizer=tokenizer, reward_kind=config.reward.kind, today=today)
    solved_limit, hint = _solved_limit(config, model.hf.max_position_embeddings), choice.cls.hint(choice.options)
    prompts = mixed(
        config.data, lambda part, section: load(part, section=section, solved_limit=solved_limit, hint=hint)
    )
    held_out: dict[str, PromptDataset] = {}
    for name, data in config.eval.sets.items():
        place = eval_place(name)
        held_out[name] = load(data, section=place).without(prompts, place)
    stops = model.stop_token_ids
    end = end_token_id(tokenizer, stops, chat=config.data.template == "chat")
    encode = partial(response_tokens, tokenizer, end=end)
    decode = partial(response_text, tokenizer, stop_token_ids=stops)

    def hinted_prompt(prompt: Prompt, solution: str | None) -> TokenArray | None:
        ids = prompts.hinted(prompt.index, solution)
        return None if ids is None else np.asarray(ids, np.int32)

    tools = Tools(model.hf, decode, hinted_prompt, encode, prompts)
    inputs = Inputs(
        model.path,
        tokenizer,
        prompts,
        held_out,
        stops,
        max_model_len,
        source,
        forked,
        today,
        choice.make(config, tools),
        encode,
        decode,
        {name: read_frozen(config, name, model) for name in config.rl.samplers},
    )
    _check_place_in_data(config, inputs)
    return inputs


def read_frozen(config: Config, name: str, policy: ModelFolder) -> FrozenModel:
    """A model that is sampled from beside the policy: it has to read and write the same tokens, in a context long enough.

    Prompts reach it as the policy's tokens, and the policy's end of a response ends its own. So its chat template is never
    read; one that differs is only noted, as is a token that ends its responses alone.

    Raises:
        ConfigError: it cannot be read, has another vocabulary or too short a context.
    """
    key, chat = f"rl.samplers.{name}", speaks_in_turns(config)
    try:
        folder = read_model(ModelConfig(hf_path=config.rl.samplers[name]), chat=chat)
    except ConfigError as error:
        raise ConfigError(f"{key}: {str(error).removeprefix('model.hf_path: ')}") from None
    if folder.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigError(
            f"{key}: the tokenizer of {folder.path} is not that of {policy.path}; a frozen sampler has to read and write the "
            "policy's tokens: take a model of the same family"
        )
    if folder.hf.vocab_size > policy.hf.vocab_size:
        raise ConfigError(
            f"{key}: {folder.path} has logits for {folder.hf.vocab_size} tokens, and the policy's embedding ends at "
            f"{policy.hf.vocab_size}; take a model with as many"
        )
    needed, context = config.data.max_prompt_tokens + config.rollout.max_tokens, folder.hf.max_position_embeddings
    if needed > context:
        raise ConfigError(
            f"{key}: data.max_prompt_tokens + rollout.max_tokens = {needed} tokens exceeds the context of {folder.path}, "
            f"{context} (max_position_embeddings); lower one of them, or take a model with a longer context"
        )
    notes = []
    if chat and folder.tokenizer.chat_template != policy.tokenizer.chat_template:
        notes.append(f"{key}: its chat template differs from the policy's, in which it gets its prompts")
    if other := set(folder.stop_token_ids) - set(policy.stop_token_ids):
        tokens = ", ".join(map(str, policy.tokenizer.convert_ids_to_tokens(sorted(other))))
        notes.append(f"{key}: {tokens} ends its responses, but not the policy's: after it they run on")
    return FrozenModel(folder, saved_dtype(HFReader(folder.path)), needed, tuple(notes))


def agree_on_date(inputs: Inputs, config: Config, topology: Topology) -> Inputs:
    """The inputs as of the main rank's date: midnight may lie between the starts of two ranks. A collective."""
    today = topology.share_from_all(inputs.today)[0]
    return inputs if today == inputs.today else read_inputs(config, today)


def _find_checkpoint(config: Config) -> tuple[Path | None, bool]:
    """The newest state there is: the run's own, else that of the run it forks from."""
    RunFolder(config.run.path).check()
    own = latest_checkpoint(RunFolder(config.run.path).checkpoints)
    fork = config.run.fork_from
    if own is not None or fork is None:
        return own, False
    for folder in (Path(fork), RunFolder(Path(fork)).checkpoints):
        if problem := problem_of_folder(folder):
            raise ConfigError(f"run.fork_from: {folder} cannot be read: {problem}")
    source = latest_checkpoint(RunFolder(Path(fork)).checkpoints)
    if source is None:
        state = "has no complete checkpoint under checkpoints/" if Path(fork).is_dir() else "does not exist"
        raise ConfigError(f"run.fork_from: {fork} {state}; name the folder of a run that has saved one")
    return source, True


def _saved_date(source: Path | None) -> date | None:
    """The date of the run that wrote `source`; one by an earlier version has none."""
    saved = None if source is None else read_run_state(source).date
    return None if saved is None else date.fromisoformat(saved)


def _solved_limit(config: Config, model_limit: int) -> tuple[int, str] | None:
    """How long a prompt with its worked answer may be, and what says so; None where none is trained on."""
    limits = [
        (config.parallel.microbatch_tokens, "parallel.microbatch_tokens"),
        (model_limit, "the model's context (max_position_embeddings) of"),
    ]
    return min(limits) if config.sft.steps else None


def _check_place_in_data(config: Config, inputs: Inputs) -> None:
    """Refuses a checkpoint written over other data now, not after the model is built."""
    if inputs.source is None:
        return
    state = read_run_state(inputs.source)
    for cursor, saved in zip(inputs.cursors(config), (state.cursor, state.sft_cursor), strict=True):
        if saved is not None:
            if problem := cursor.problem_of(saved):
                raise other_version(inputs.source, problem)
            cursor.load_state(saved)


def context_length(config: Config, model_limit: int) -> int:
    """Longest prompt plus longest response, which the engine's context must hold."""
    train = config.data.max_prompt_tokens
    sequences = {"data.max_prompt_tokens + rollout.max_tokens": train + config.rollout.max_tokens}
    for name, data in config.eval.sets.items():
        longest = data.max_prompt_tokens + config.eval.max_tokens
        sequences[f"{eval_place(name)}.max_prompt_tokens + eval.max_tokens"] = longest
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
