"""The process that sees the answers: reads chunks of work from one pipe, writes a record for each item to another."""

from __future__ import annotations

import os
import pickle
import struct
from typing import TYPE_CHECKING, BinaryIO

from megatron_reheat.processes import die_with_parent
from megatron_reheat.rewards.functions import RewardFunctionError, Score
from megatron_reheat.rewards.protocol import CHUNK, CORRECT, ERROR, INCORRECT, MAX_NOTE, ORDER, RECORD
from megatron_reheat.rewards.sandbox import SystemCallFilter, limit_resources, refuse_side_effects

if TYPE_CHECKING:
    from megatron_reheat.rewards.graders import Grader


def grade_chunks(
    orders: int, records: int, grader: Grader, parent_pid: int, system_calls: SystemCallFilter | None, confined: bool
) -> None:
    """The whole life of a freshly forked grader, in its sandbox if `confined`. Ends when nobody can send orders any more.

    `orders` and `records` are the file descriptors of its two pipes; all others are closed.
    """
    die_with_parent(parent_pid, "reward worker")
    os.setsid()
    _close_all_but(orders, records)
    inbox = os.fdopen(orders, "rb")
    if confined:
        limit_resources()
        if system_calls is not None:
            system_calls.load(writable=records)
        refuse_side_effects()
    while header := inbox.read(ORDER.size):
        nonce, begin, size = ORDER.unpack(header)
        _grade_chunk(inbox, size, nonce, begin, records, grader)


def _grade_chunk(inbox: BinaryIO, size: int, nonce: bytes, begin: int, records: int, grader: Grader) -> None:
    """Answers each item as soon as it is graded, in order, so that the supervisor can time every item."""
    first, _ = CHUNK.unpack(inbox.read(CHUNK.size))
    items = pickle.loads(inbox.read(size - CHUNK.size))
    for number, (text, verifier) in enumerate(items[begin:], start=first + begin):
        values = note = b""
        try:
            # a copy for every item: some of reasoning-gym's scorers write into the record
            grade = grader(text, pickle.loads(verifier))
            if isinstance(grade, Score):
                values = struct.pack(f"!{len(grade.values)}d", *grade.values)
            correct = grade.correct if isinstance(grade, Score) else grade >= 1.0
            verdict = CORRECT if correct else INCORRECT
        except Exception as error:  # graders and sympy raise anything on odd text; the pool counts these
            text = str(error) if isinstance(error, RewardFunctionError) else f"{type(error).__name__}: {error}"
            verdict, note = ERROR, text.encode(errors="replace")[:MAX_NOTE]
        os.write(records, RECORD.pack(nonce, number, verdict, values, note))


def _close_all_but(*kept: int) -> None:
    """Closes every other file descriptor; the standard streams lead nowhere: parsers complain of every odd answer."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    start = 3
    for fd in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(start, fd)
        start = fd + 1
