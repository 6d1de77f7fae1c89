"""Errors meant for the user: one line that names the key, file or process and the way out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_reheat.confidential import redact_text


class ReheatError(RuntimeError):
    """Something at run time that the user can act on; printed without a traceback by the command line.

    `on_every_rank` tells that all ranks raise the same error, so that one of them printing it is enough.
    """

    on_every_rank = False


class ConfigError(ReheatError, ValueError):
    """The configuration is wrong; raised before any model is loaded. One line without secrets, whatever it repeats of
    what was typed."""

    on_every_rank = True

    def __init__(self, message: str) -> None:
        super().__init__(printable(redact_text(message)))


class ModelElsewhereError(ConfigError):
    """The model's configuration is not to be had on this machine; another one may have it."""


class EngineDied(ReheatError):
    """A vLLM engine process ended or stopped answering."""


class RankLost(ReheatError):
    """Another rank of the run has ended, or did not answer in time."""


class EngineStuck(EngineDied):
    """It is there still, and of no use before it was started again."""


class WeightSyncError(ReheatError):
    """The engine does not hold the weights the trainer sent; the message names the tensors."""


class NonFiniteLossError(ReheatError):
    """The loss or its gradients stayed NaN or infinite for too many steps in a row."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what the operating system refuses to write (a full disk, a lost mount) is one sentence about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the operating system's
            raise
        raise cannot_write(path, os.strerror(error.errno)) from None


def cannot_write(path: Path, reason: str) -> ReheatError:
    """For what a run could not save or log; says that what was saved before is whole."""
    return ReheatError(
        f"cannot write {path}: {reason}; make room there or change run.folder: what was saved before is whole, and the "
        "same command goes on from it"
    )


def printable(text: str, keep: str = "") -> str:
    """`text` with everything but `keep` that moves a cursor or cannot be encoded written as an escape."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def print_error(message: str) -> None:
    """On stderr, without secrets; line breaks stay, other control characters are escaped."""
    print(f"error: {printable(redact_text(message), keep=chr(10))}", file=sys.stderr, flush=True)
