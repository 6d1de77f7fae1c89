"""On the path of a run: a thread in its launcher and in each rank that keeps in a file where in the code the main thread is.

So that it can be told what a killed process was doing. Nothing of the run is changed; Python imports this before anything else.
"""

import os
import signal
import sys
import threading
import time

EVERY_S = 0.005
FIRST = os.getpid()
SIZE = 2000  # bytes; one write replaces all of it


def _watch() -> None:
    threading.Thread(target=_keep, daemon=True).start()


def _keep() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the threads of the run
    main = threading.main_thread().ident
    # a rank that is forked is told which one it is a moment later
    while os.getpid() != FIRST and "RANK" not in os.environ:
        time.sleep(EVERY_S)
    path = os.path.join(os.environ["WATCHED"], f"rank-{os.environ.get('RANK', 'none')}")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    while True:
        frame, calls = sys._current_frames().get(main), []  # type: ignore[arg-type]
        while frame is not None:
            package, _, module = frame.f_code.co_filename.rpartition("/megatron_reheat/")
            if package:
                calls.append(f"{module.removesuffix('.py')}:{frame.f_code.co_name}")
            frame = frame.f_back
        os.pwrite(descriptor, " ".join(reversed(calls)).encode()[:SIZE].ljust(SIZE), 0)
        time.sleep(EVERY_S)


if "WATCHED" in os.environ and sys.orig_argv[1:3] == ["-m", "megatron_reheat"]:
    os.register_at_fork(after_in_child=_watch)
    _watch()
