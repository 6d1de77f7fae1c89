"""The pass over all records at the start of a run: each is checked, and those that become prompts are measured."""

from __future__ import annotations

import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_reheat.data.dataset import BATCH, Columns, Counts, RenderedPrompts, digest_of, extend_fingerprint
from megatron_reheat.data.records import Record, Records
from megatron_reheat.data.rendering import Renderer
from megatron_reheat.errors import ConfigError
from megatron_reheat.types import HintSource


@dataclass(frozen=True)
class _Candidate:
    """A record that may become a prompt."""

    row: int
    text: str
    digest: int
    solution: str | None
    hinted: str | None


class Survey:
    """The one pass over all records at the start: checks each, and decides which become prompts."""

    def __init__(
        self,
        renderer: Renderer,
        records: Records,
        solved_limit: tuple[int, str] | None,
        hint: HintSource | None = None,
    ) -> None:
        self._renderer = renderer
        self._records = records
        self._solved_limit = solved_limit
        self._hint = hint
        # digest of a text -> its tokens, 0 until it is tokenized; a text that was met before is not tokenized again
        self._lengths: dict[int, int] = {}
        self._solved = array.array("Q")  # digests of text and answer together
        self._rows, self._digests, self._num_tokens = array.array("q"), array.array("Q"), array.array("i")
        self._crc = 0
        self._num_long_hints = 0

    def prompts(self) -> RenderedPrompts:
        """Makes the pass, once: over `size` records at most, not counting duplicates that are left out.

        Raises:
            ConfigError: naming the record that does not fit; or none becomes a prompt.
        """
        config = self._renderer.config
        batch: list[_Candidate] = []
        first = ""
        num_taken = num_duplicates = 0
        for row, record in enumerate(self._records):
            candidate = self._candidate(row, record)
            first = first or candidate.text
            is_duplicate = candidate.digest in self._lengths
            num_duplicates += is_duplicate
            if is_duplicate and config.deduplicate:
                continue
            self._lengths.setdefault(candidate.digest, 0)
            batch.append(candidate)
            num_taken += 1
            if len(batch) == BATCH:
                self._take(batch)
                batch.clear()
            if num_taken == config.size:
                break
        self._take(batch)
        if not num_taken:
            raise ConfigError(f"{self._renderer.section}: there are no records to make prompts of")
        if not self._rows:
            raise ConfigError(
                f"{self._renderer.section}.max_prompt_tokens {config.max_prompt_tokens} skips all {num_taken} prompts; "
                "raise it"
            )
        counts = Counts(
            records=row + 1,
            skipped=num_taken - len(self._rows),
            duplicates=num_duplicates,
            other_answers=len(np.unique(self._solved)) - len(self._lengths) if len(self._solved) else 0,
        )
        columns = Columns(
            np.array(self._rows, np.int64), np.array(self._digests, np.uint64), np.array(self._num_tokens, np.int32)
        )
        notes = [*self._renderer.notes(first), *self._hint_notes()]
        return RenderedPrompts(self._renderer, self._records, columns, counts, notes, self._crc)

    def _candidate(self, row: int, record: Record) -> _Candidate:
        renderer, where = self._renderer, self._records.where(row)
        text, solution = renderer.text(record, where), renderer.solution(record, where)
        verifier = renderer.verifier(record, where)
        hinted = None
        if self._hint is not None:
            hinted = renderer.hinted_text(record, where, "" if self._hint == "sibling" else None)
        if "answer" in verifier:  # of other kinds, several answers may be right
            self._solved.append(digest_of(f"{verifier['answer']}\0{text}"))
        return _Candidate(row, text, digest_of(text), solution, hinted)

    def _take(self, batch: Sequence[_Candidate]) -> None:
        """Keeps those of `batch` that are short enough."""
        new = {c.digest: c for c in batch if not self._lengths[c.digest]}
        encoded = self._encode([(c.row, c.text) for c in new.values()], "prompt")
        self._lengths.update(zip(new, map(len, encoded), strict=True))
        kept = [c for c in batch if self._fits(c, self._lengths[c.digest])]
        for candidate in kept:
            self._rows.append(candidate.row)
            self._digests.append(candidate.digest)
            self._num_tokens.append(self._lengths[candidate.digest])
            self._crc = extend_fingerprint(self._crc, candidate.text)
        if self._solved_limit is not None:
            self._check_solutions(kept, *self._solved_limit)
        self._check_hints([(c.row, c.hinted) for c in kept if c.hinted is not None])

    def _encode(self, texts: Sequence[tuple[int, str]], what: str) -> list[list[int]]:
        """Of (row, text) each."""
        try:
            return self._renderer.encode([text for _, text in texts])
        except Exception as error:  # the tokenizers library raises bare Exception on text that is not in its vocabulary
            if len(texts) > 1:
                return [self._encode([one], what)[0] for one in texts]
            where = self._records.where(texts[0][0])
            raise ConfigError(
                f"{self._renderer.section}: the tokenizer does not read the {what} of {where}: {error}; leave out what is not "
                "in its vocabulary, or use another model"
            ) from None

    def _fits(self, candidate: _Candidate, num_tokens: int) -> bool:
        config, section = self._renderer.config, self._renderer.section
        if num_tokens == 0 or not candidate.text:
            where = self._records.where(candidate.row)
            raise ConfigError(f"{where} makes a prompt of no tokens; check {section}.template and the tokenizer")
        if num_tokens <= config.max_prompt_tokens:
            return True
        if config.on_long_prompt == "skip":
            return False
        raise ConfigError(
            f"the prompt of {self._records.where(candidate.row)} has {num_tokens} tokens, above {section}.max_prompt_tokens "
            f"{config.max_prompt_tokens}; raise it or set {section}.on_long_prompt=skip"
        )

    def _check_solutions(self, batch: Sequence[_Candidate], limit: int, limited_by: str) -> None:
        solved = [c for c in batch if c.solution is not None]
        texts = [c.solution or "" for c in solved]
        encoded = self._renderer.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for candidate, ids in zip(solved, encoded, strict=True):
            num_tokens = self._lengths[candidate.digest] + len(ids) + 1  # the one that ends the answer
            if num_tokens > limit:
                raise ConfigError(
                    f"prompt and worked answer ({self._renderer.section}.solution_template) of "
                    f"{self._records.where(candidate.row)} have {num_tokens} tokens, above {limited_by} {limit}; "
                    "raise that or leave the record out"
                )

    def _check_hints(self, hinted: Sequence[tuple[int, str]]) -> None:
        """Of (row, hinted prompt) each. One that is too long is not shown, or an error; its record stays."""
        config, section = self._renderer.config, self._renderer.section
        for (row, _), ids in zip(hinted, self._encode(hinted, "hinted prompt"), strict=True):
            if len(ids) <= config.max_hinted_prompt_tokens:
                continue
            if config.on_long_prompt == "error":
                raise ConfigError(
                    f"the hinted prompt ({section}.hint_template) of {self._records.where(row)} has {len(ids)} tokens, above "
                    f"{section}.max_hinted_prompt_tokens {config.max_hinted_prompt_tokens}; raise it, or set "
                    f"{section}.on_long_prompt=skip to train on that record without a hint"
                )
            self._num_long_hints += 1

    def _hint_notes(self) -> list[str]:
        section = self._renderer.section
        if not self._num_long_hints:
            return []
        return [f"{self._num_long_hints:,} hints longer than {section}.max_hinted_prompt_tokens are not shown"]
