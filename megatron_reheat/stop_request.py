"""The notice "save and end": SIGUSR1, SIGTERM or a first Ctrl-C, which the processes of a run block and its ranks look for
between two steps.

Blocked instead of handled, because a blocked signal is inherited by child processes and waits: a scheduler may signal every
process of a job without killing an engine or a verifier, and a notice that comes while a run starts is not lost.

SIGTERM and Ctrl-C (SIGINT) are awaited in a thread, which makes SIGUSR1 of them. Whoever sends SIGTERM kills a while later: the
run has a grace time of its own, after which it ends in the middle of a step, in order and with a word. So does a second Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_reheat.errors import print_error
from megatron_reheat.run_folder import RunFolder

# A run that ends with this status has saved everything; the same command goes on from there.
REQUEUE_EXIT_CODE = 85
STOP_SIGNAL = signal.SIGUSR1
PASS_ON_EVERY_S = 0.5
FINISHING = "stopping after the step in progress"
_AWAITED = {signal.SIGINT, signal.SIGTERM}
# a terminal that is gone, or a `tee` that the same Ctrl-C has ended, must not keep a run from ending in order
_MAYBE_NOBODY_LISTENS = contextlib.suppress(OSError)


def hold_stop_signals() -> None:
    """Blocks the notice in its three forms, here and in what is started from here on; call it before anything makes threads.

    SIGTERM and SIGINT are left alone where they are ignored: behind a script's `&`, say.
    """
    heeded = {number for number in _AWAITED if signal.getsignal(number) != signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL, *heeded})


@dataclass(frozen=True)
class StopWatch:
    """What comes of Ctrl-C and SIGTERM.

    Attributes:
        stopped: what to say when a process ends in the middle of something; its argument names the reason.
        finishing: what to say to the notice: what is being waited for. None where another process says it.
        grace_s: what SIGTERM leaves for it; None is for ever.
        end_others: ends what would not end by itself with this process.
        is_final: of the process that sent SIGTERM: whether it is no notice but an end at once.
    """

    stopped: Callable[[str], str]
    finishing: str | None = None
    grace_s: float | None = None
    end_others: Callable[[], None] = lambda: None
    is_final: Callable[[int], bool] = lambda sender: False

    def start(self) -> None:
        """From here on; signals that came since `hold_stop_signals` count. Does nothing where none is held."""
        held = _AWAITED & signal.pthread_sigmask(signal.SIG_BLOCK, ())
        if held:
            threading.Thread(target=self._await, args=(held,), daemon=True).start()

    def _await(self, held: set[signal.Signals]) -> None:
        noticed, deadline = False, None
        while True:
            if deadline is None:
                got = signal.sigwaitinfo(held)
            elif (timely := signal.sigtimedwait(held, max(0.0, deadline - time.monotonic()))) is not None:
                got = timely
            else:
                self._end(signal.SIGTERM, f"SIGTERM, whose grace time of {self.grace_s:g} s (run.stop_grace_s) is over")
            if got.si_signo == signal.SIGINT:
                if noticed:
                    self._end(signal.SIGINT, "SIGINT")
                more = "; Ctrl-C again stops at once"
            elif self.is_final(got.si_pid):
                _die_of(signal.SIGTERM)
            elif deadline is None and self.grace_s is not None:
                deadline = time.monotonic() + self.grace_s
                more = f"; at the latest {self.grace_s:g} s from now (run.stop_grace_s)"
            elif noticed:
                continue
            else:
                more = ""
            if not noticed:
                os.kill(os.getpid(), STOP_SIGNAL)
                noticed = True
            if self.finishing:
                with _MAYBE_NOBODY_LISTENS:
                    print(self.finishing + more, file=sys.stderr, flush=True)

    def _end(self, number: signal.Signals, reason: str) -> None:
        if self.finishing:
            with _MAYBE_NOBODY_LISTENS:
                print_error(self.stopped(reason))
        self.end_others()
        # not an exception: the main thread may be in a collective, a compiler or an engine's answer for minutes
        os._exit(128 + number)


def _die_of(number: signal.Signals) -> None:
    """By the signal itself, as if nobody had held it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)


def stopped_by(name: str, folder: RunFolder | None = None) -> str:
    """What a run that ends in the middle of a step says. `name` is the signal's; without `folder` no step is named."""
    return f"stopped by {name}; {how_to_go_on(folder)}"


def how_to_go_on(folder: RunFolder | None = None) -> str:
    """The end of what a run says that has not saved its last steps."""
    if folder is None:
        return "the same command goes on from the latest checkpoint, if there is one"
    if (step := folder.saved_step) is None:
        return "nothing is saved yet, the same command starts anew"
    return f"the same command goes on from step {step}, the latest that is saved"


def asked_to_stop(step: int) -> str:
    """What a run says that ends after step `step` and has saved it; 0 is before the first."""
    if step:
        return f"asked to stop after step {step}; the same command goes on from there"
    return "asked to stop before the first step; nothing is saved yet, the same command starts anew"


def stop_requested() -> bool:
    """Whether this process has been sent the notice since `hold_stop_signals`."""
    return STOP_SIGNAL in signal.sigpending()


def pass_on_stop_signal() -> None:
    """For a launcher that holds the notice: sends it on to the child processes when it comes."""
    threading.Thread(target=_pass_on, daemon=True).start()


def _pass_on() -> None:
    import psutil

    signal.sigwait({STOP_SIGNAL})
    while True:  # ranks may start after the notice; to one that has it already another makes no difference
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                child.send_signal(STOP_SIGNAL)
        time.sleep(PASS_ON_EVERY_S)
