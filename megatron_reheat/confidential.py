"""Secrets: where they come from, and how they are kept out of everything that is written down."""

from __future__ import annotations

import re
from typing import Any

TOKEN_VARIABLE = "REHEAT_SERVER_TOKEN"  # of the environment: a command line is for everybody on the machine to read
HIDDEN = "***"

_SECRET_NAME = re.compile(
    r"(^|[._-])(token|password|passwd|passphrase|pwd|secret|credentials?|authorization|api_?key|access_?key(_?id)?|"
    r"secret_?key|private_?key|account_?key|sas|client_?secret|auth)$|(token|secret|password|api_?key)$",
    re.IGNORECASE,
)
_OF_A_TEXT = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|stop|start|begin|end|image|special)_?token$", re.IGNORECASE)
_IN_TEXT = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/'\"]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    # in the query of a URL
    (
        re.compile(
            r"([?&](?:[\w.-]*(?:token|signature|secret|password|key|credential)|sig|auth)=)[^&\s'\"#]+", re.IGNORECASE
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\bBearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    # by their makers' marks: Hugging Face, OpenAI and others, GitHub, AWS, Slack
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{30,}|sk-(?:proj-|ant-)?[A-Za-z0-9]{32,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}|"
            r"github_pat_[A-Za-z0-9_]{30,}|xox[abprs]-[A-Za-z0-9-]{24,}|wandb_v1_[A-Za-z0-9_]{30,})"
        ),
        HIDDEN,
    ),
)
# a key of Weights & Biases has the form of a commit, which goes by its key's name
_WANDB_KEY, _COMMIT_NAME = re.compile(r"[0-9a-f]{40}"), re.compile("revision|commit|sha|hash|version", re.IGNORECASE)


def redact(value: Any, *, passed_on: bool = False) -> Any:
    """A configuration's tree without its secrets: in mappings that are passed on they go by keys, elsewhere by form.

    Args:
        passed_on: `value` lies in such a mapping, whose keys others have named.
    """
    if isinstance(value, dict):
        return {
            key: HIDDEN
            if _is_secret(str(key), inner, passed_on)
            else redact(inner, passed_on=passed_on or _is_passed_on(key))
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(redact(item, passed_on=passed_on) for item in value)
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """`text` with passwords in URLs, and what has the form of a well-known service's key, hidden."""
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def holds_secret(key: str, text: str) -> bool:
    """Whether `key=text`, as typed behind a recipe's name, gives a secret away."""
    *above, leaf = key.split(".")
    is_passed_on = any(map(_is_passed_on, above))
    named = _is_secret(leaf, text, is_passed_on)
    inside = _is_passed_on(leaf) and any(_SECRET_NAME.search(word) for word in re.findall(r"([\w.-]+)['\"]?\s*:", text))
    return named or inside or redact_text(text) != text


def _is_passed_on(key: Any) -> bool:
    return str(key).endswith(("options", "kwargs"))


def _is_secret(key: str, value: Any, passed_on: bool) -> bool:
    if isinstance(value, str) and _WANDB_KEY.fullmatch(value):
        return not _COMMIT_NAME.search(key)
    holds_something = isinstance(value, str | int | dict | list) and not isinstance(value, bool) and bool(value)
    return passed_on and holds_something and bool(_SECRET_NAME.search(key)) and not _OF_A_TEXT.search(key)
