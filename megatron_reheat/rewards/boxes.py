r"""Where a response's final answer stands: its last whole box, or else its last line `Answer: ...`.

Free of imports beyond `re`: the pool looks for the answer in the trainer, so that a worker gets a few characters
instead of a whole response.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# how far before the last box one may begin that holds it; the rest of a long response is not read token by token
NEAR_CHARS = 2000

# after \boxed or \fbox without braces TeX takes what comes next; prose that only names the command is no box
_UNBRACED = (
    r"[-+]?\d+(?:[.,/]\d+)*|\\[dt]?frac(?:\s*(?:\{[^{}]*\}|\w)){2}|\\sqrt\s*(?:\{[^{}]*\}|\w)"
    r"|[A-Za-z](?=\s*(?:\$|\.?\s*$))"
)
_COMMAND = re.compile(r"\\(?:boxed|fbox)")
_TOKEN = re.compile(
    rf"\\\\?(?:boxed|fbox)\s*(?:(?P<box>\{{)|(?P<unbraced>{_UNBRACED}))|\\.|[{{}}]", re.DOTALL | re.MULTILINE
)
_ANSWER_LINE = re.compile(
    r"^[\s>*#_]*(?:(?:the|my)\s+)?(?:final\s+)?answer(?:\s+is)?\s*[*_]*\s*:[*_\s]*(\S[^\n]*)$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Box:
    r"""`text[start:end]` is the whole of `\boxed{content}`."""

    start: int
    end: int
    content: str


def last_box(text: str) -> Box | None:
    r"""The last `\boxed{...}` or `\fbox{...}` whose braces close, whatever follows it, an unfinished box too.

    An empty box is none; of boxes in one another it is the outer one. Linear in the text, however many are left open.
    """
    if (first := _COMMAND.search(text)) is None:
        return None
    near_end = max(text.rfind(r"\boxed"), text.rfind(r"\fbox")) - NEAR_CHARS
    box = _last_box_from(text, near_end) if near_end > first.start() else None
    return box or _last_box_from(text, first.start())


def _last_box_from(text: str, start: int) -> Box | None:
    last = None
    opened: list[re.Match[str] | None] = []
    for token in _TOKEN.finditer(text, start):
        if token["unbraced"]:
            last = Box(token.start(), token.end(), token["unbraced"])
        elif token["box"] or token.group() == "{":
            opened.append(token if token["box"] else None)
        elif token.group() == "}" and opened and (box := opened.pop()):
            content = text[box.end() : token.start()].strip()
            last = Box(box.start(), token.end(), content) if content else last
    return last


def last_boxed(text: str) -> str | None:
    """What stands inside the last whole box, or None if there is none."""
    box = last_box(text)
    return box.content if box else None


def graded_part(response: str, answer_chars: int) -> str:
    """All of a response that `final_answer` needs: its last box, or its last `answer_chars` characters if it has none."""
    box = last_box(response)
    return response[box.start : box.end] if box else response.rstrip()[-answer_chars:]


def final_answer(response: str) -> str | None:
    r"""The last box's content, or without any box what follows `Answer:` in the last line that begins so.

    None if there is neither: a derivation that was cut off may end in the right number by accident.
    """
    if (box := last_box(response)) is not None:
        return box.content
    lines = _ANSWER_LINE.findall(response)
    return lines[-1].strip("*_ ") if lines else None


def reference_answer(reference: str) -> str:
    """What a reference's box holds, or what stands behind its `####`, or all of it."""
    return last_boxed(reference) or reference.rpartition("####")[2].strip()
