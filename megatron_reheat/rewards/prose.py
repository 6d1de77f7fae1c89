r"""Words round an answer (`\text{The answer is} 5`) and answers that are words (`\text{Monday}`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_reheat.rewards.latex import unbraced, word_set

TEXT = r"\\text\{([^{}]*)\}"


# words that make what stands beside them mean something else
NEGATING = word_set(
    "is are was no not never none less more greater fewer smaller larger bigger at least most than or nor and if unless when "
    "where for wrong except maybe mod modulo half twice double then either both true false base squared cubed "
    "times plus minus over under between through to"
)
ARTICLES = word_set("a an the of")
_MONTHS = word_set(
    "january february march april may june july august september october november december "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)
_COUNTED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
)
NUMBERS = {word: number for number, word in enumerate(_COUNTED.split())}
_ADVERBS = word_set("so thus hence therefore finally approximately approx about exactly only roughly")
_ANNOUNCING = word_set("is are equals equal be option choice answer") | _ADVERBS
_SENTENCE = re.compile(
    r"(?:(?:so|thus|hence|therefore)\s+)?(?:(?:the|my|our)\s+)?(?:(?:final|correct|right)\s+)?"
    r"(?:answer|value|result|solution|choice|option)s?(?:\s+(?:is|are|equals))?\s+(?!not\b)(.+)",
    re.IGNORECASE,
)
_LABEL = re.compile(rf"{TEXT}\s*([:,]?)\s*(?=\S)")
_FOR_ALL = re.compile(r"\s*,?\s*(?:\\text\{for (?:all|every|any|each)\b[^{}]*\}|\\forall(?![A-Za-z])).*$")
_REMARK = re.compile(rf"\s*\(\s*{TEXT}\s*\)$")
_NO_PROSE = re.compile(r"[^\w\s,.'()/:-]")


@dataclass(frozen=True)
class Words:
    """In lower case, without articles; those of a date in the order of the alphabet."""

    tokens: tuple[str, ...]


def without_prose(text: str) -> str:
    r"""The answer alone, of `\text{The answer is} 5`, `\text{Area}: 5`, `5 (\text{approximately})` and the like."""
    while True:
        shorter = _FOR_ALL.sub("", _without_label(text))
        if (remark := _REMARK.search(shorter)) and {*remark[1].lower().split()} <= _ADVERBS:
            shorter = shorter[: remark.start()]
        if (said := re.match(TEXT, shorter)) and (sentence := _SENTENCE.fullmatch(said[1].strip())):
            shorter = rf"\text{{{sentence[1]}}}{shorter[said.end() :]}"
        if shorter == text:
            return text
        text = unbraced(shorter.strip(" ,;:"))


def words(text: str) -> Words | None:
    """Words alone, or a date with its numbers; None for anything else."""
    plain = re.sub(TEXT, r" \1 ", text)
    tokens = re.findall(r"[^\W\d_]+|\d+", plain.lower().replace("'", ""))
    if plain == text or not tokens or _NO_PROSE.search(plain):
        return None
    if _MONTHS & {*tokens}:
        return Words(tuple(sorted({*tokens} - ARTICLES)))
    if re.sub(TEXT, "", text).strip(" ()-.'"):
        return None  # numbers or letters beside the words, or several texts
    return Words(tuple(token for token in tokens if token not in ARTICLES) or tuple(tokens))


def listed(text: str) -> list[str]:
    r"""The parts of `\text{Ann and Bob}`; one part if it lists nothing."""
    return [part.strip() for part in re.split(r",|\b(?:and|or)\b", re.sub(TEXT, r" \1 ", text)) if part.strip()]


def _without_label(text: str) -> str:
    label = _LABEL.match(text)
    if label is None or not label[1].split():
        return text
    words_of_label, rest = label[1].lower().split(), text[label.end() :]
    if label[2] == ",":
        announces = words_of_label[-1] in _ADVERBS
    else:
        announces = words_of_label[-1] in _ANNOUNCING or (label[2] == ":" and len(label[1]) > 1)
    first = re.match(r"(?:\\text\{)?\s*([a-z]+)", rest.lower())
    said = {*words_of_label, *(first.groups() if first else ())} - _ANNOUNCING
    return text if not announces or said & NEGATING else rest
