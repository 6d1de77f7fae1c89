"""The notice "save and end": SIGUSR1, which every process of a run blocks and its ranks look for between two steps.

Blocked instead of handled, because a blocked signal is inherited by child processes and waits: a scheduler may signal every
process of a job without killing an engine or a verifier, and a notice that comes while a run starts is not lost.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time

# A run that ends with this status has saved everything; the same command goes on from there.
REQUEUE_EXIT_CODE = 85
STOP_SIGNAL = signal.SIGUSR1
PASS_ON_EVERY_S = 0.5


def hold_stop_signal() -> None:
    """Blocks the signal here and in what is started from here on; call it before anything makes threads."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})


def stop_requested() -> bool:
    """Whether this process has been sent the notice since `hold_stop_signal`."""
    return STOP_SIGNAL in signal.sigpending()


def pass_on_stop_signal() -> None:
    """For a launcher: holds the signal, and sends it on to the child processes when it comes."""
    hold_stop_signal()
    threading.Thread(target=_pass_on, daemon=True).start()


def _pass_on() -> None:
    import psutil

    signal.sigwait({STOP_SIGNAL})
    while True:  # ranks may start after the notice; to one that has it already another makes no difference
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                child.send_signal(STOP_SIGNAL)
        time.sleep(PASS_ON_EVERY_S)
