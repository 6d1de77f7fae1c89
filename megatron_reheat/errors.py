"""Errors meant for the user: one line that names the key, file or process and the way out."""

from __future__ import annotations

import sys


class ReheatError(RuntimeError):
    """Something at run time that the user can act on; printed without a traceback by the command line.

    `on_every_rank` tells that all ranks raise the same error, so that one of them printing it is enough.
    """

    on_every_rank = False


class ConfigError(ReheatError, ValueError):
    """The configuration is wrong; raised before any model is loaded."""

    on_every_rank = True


class EngineDied(ReheatError):
    """A vLLM engine process ended or stopped answering."""


class WeightSyncError(ReheatError):
    """The engine does not hold the weights the trainer sent; the message names the tensors."""


class NonFiniteLossError(ReheatError):
    """The loss or its gradients stayed NaN or infinite for too many steps in a row."""


def print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
