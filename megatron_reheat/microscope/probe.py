"""The text on which two policies are compared: prompts with responses, by default what a run sampled itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_reheat.checkpoint_folder import checkpoint_step
from megatron_reheat.data.files import read_file
from megatron_reheat.data.records import Record, Records
from megatron_reheat.data.rendering import tokens_before_text
from megatron_reheat.data.responses import response_text
from megatron_reheat.data.tokenizer import turn_end_id
from megatron_reheat.errors import ConfigError
from megatron_reheat.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ProbeSequence:
    """Token ids; neither is empty."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Probe:
    """`sources` are the files read."""

    sequences: tuple[ProbeSequence, ...]
    sources: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Of the responses."""
        return sum(len(sequence.response) for sequence in self.sequences)


def rollout_files(run: Path, checkpoint: Path) -> list[Path]:
    """A run's samples, the newest first: those up to the checkpoint's step, or all where none are so early."""
    folder = RunFolder(run).rollouts(0).parent
    numbers = {file: file.stem.removeprefix("step-") for file in folder.glob("step-*.jsonl")}
    steps = {file: int(number) for file, number in numbers.items() if number.isdecimal()}
    newest = sorted(steps, key=steps.__getitem__, reverse=True)
    last = checkpoint_step(checkpoint)
    return [file for file in newest if last is None or steps[file] <= last] or newest


def read_probe(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, end: int, context: int, limit: int) -> Probe:
    """The first `limit` sequences of files whose records have the texts `prompt` and `response`.

    A run's own rollouts have `prompt_ids` and `response_ids` beside them, which count where they are the response's.

    Args:
        end: the token behind a response that was not cut off (`finish_reason` "length").
        context: tokens that the models can read; a longer sequence is left out.

    Raises:
        ConfigError: naming the file and record at fault; also when no sequence is left.
    """
    reader = _Reader(tokenizer, end)
    sequences: list[ProbeSequence] = []
    sources: list[Path] = []
    num_long = 0
    for file in files:
        if len(sequences) == limit:
            break
        sources.append(file)
        records = _read(file)
        for index, record in enumerate(records):
            sequence = reader.sequence(record, records, index)
            if sequence is not None and len(sequence) > context:
                num_long += 1
            elif sequence is not None:
                sequences.append(sequence)
            if len(sequences) == limit:
                break
    if not sequences:
        longer = f"; {num_long} are longer than the context of {context} tokens" if num_long else ""
        raise ConfigError(
            f"--data: no response with a token in {', '.join(map(str, sources))}{longer}; name a file with prompts and "
            "responses"
        )
    notes = []
    if num_long:
        notes.append(f"{num_long} sequences longer than the context of {context} tokens are left out")
    if reader.num_otherwise:
        notes.append(
            f"{reader.num_otherwise} of {len(sequences)} responses are read back as another number of tokens than was sampled"
        )
    return Probe(tuple(sequences), tuple(sources), tuple(notes))


def _read(file: Path) -> Records:
    try:
        return read_file(file, section="data", options={})
    except ConfigError as error:
        raise ConfigError(f"--data: {str(error).removeprefix('data.path: ')}") from None


class _Reader:
    """Texts as the tokens that a policy read and wrote."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: int) -> None:
        self._tokenizer, self._end = tokenizer, end
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        # without a decoder, tokens are joined by spaces
        self._joins_by_spaces = backend is not None and backend.decoder is None
        turn_end = turn_end_id(tokenizer) if tokenizer.chat_template else None
        self._turn_end = None if turn_end is None else (turn_end, str(tokenizer.convert_ids_to_tokens(turn_end)))
        self.num_otherwise = 0

    def sequence(self, record: Record, records: Records, index: int) -> ProbeSequence | None:
        """None where the response is empty."""
        prompt, response = (_text(record, key, records, index) for key in ("prompt", "response"))
        if sampled := self._sampled(record, response):
            return sampled
        turn_end = self._turn_end[0] if self._turn_end and self._turn_end[1] in prompt else None
        prompt_ids = self._encode(prompt)
        # what the chat template wrote has its special tokens already
        leading = tokens_before_text(self._tokenizer, prompt) if turn_end is None else []
        if prompt_ids[: len(leading)] != leading:
            prompt_ids = [*leading, *prompt_ids]
        end = [] if record.get("finish_reason") == "length" else [self._end if turn_end is None else turn_end]
        ids = [*self._encode(response), *end]
        num_tokens = record.get("num_tokens")
        if num_tokens is not None and len(ids) != num_tokens and self._joins_by_spaces:
            apart = self._tokenizer.convert_tokens_to_ids(response.split(" "))
            if None not in apart and len(apart) + len(end) == num_tokens:
                ids = [*apart, *end]
        self.num_otherwise += num_tokens is not None and len(ids) != num_tokens
        if not prompt_ids:  # nothing is there that could predict the first token
            prompt_ids, ids = ids[:1], ids[1:]
        return ProbeSequence(tuple(prompt_ids), tuple(ids)) if ids else None

    def _sampled(self, record: Record, response: str) -> ProbeSequence | None:
        """The tokens themselves, where a run kept them and they are this tokenizer's."""
        prompt_ids, ids = (record.get(key) for key in ("prompt_ids", "response_ids"))
        if not (_are_ids(prompt_ids, len(self._tokenizer)) and _are_ids(ids, len(self._tokenizer))):
            return None
        assert prompt_ids is not None and ids is not None
        stops = [] if record.get("finish_reason") == "length" else ids[-1:]
        if response_text(self._tokenizer, ids, stops) != response:
            return None
        return ProbeSequence(tuple(prompt_ids), tuple(ids))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _are_ids(value: Any, vocab_size: int) -> bool:
    """Whether these are one token or more."""
    if not isinstance(value, list) or not value:
        return False
    return all(type(token) is int and 0 <= token < vocab_size for token in value)


def _text(record: Record, key: str, records: Records, index: int) -> str:
    text = record.get(key)
    if not isinstance(text, str):
        held = "no" if text is None else f"a {type(text).__name__} as"
        raise ConfigError(
            f"--data: {records.where(index)} has {held} {key!r}; name a file whose records have the texts prompt and response, "
            "as a run's rollouts/step-*.jsonl"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        # what a rollout's text may hold, and no tokenizer reads
        return text.encode("utf-8", "replace").decode()
    return text
