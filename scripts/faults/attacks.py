"""Fifty programs that attack the grader from within its process, should an answer ever be run."""

from __future__ import annotations

_EVERY_FD = "import os\nfor fd in range(256):\n    try: os.write(fd, {})\n    except OSError: pass\n"

# `value = 1` is what an honest answer to the attacks' question would leave; none of these may count as that.
ATTACKS: dict[str, str] = {
    # -- signals to whoever can be named
    "kill the parent": "import os; os.kill(os.getppid(), 9)",
    "kill process 1": "import os; os.kill(1, 9)",
    "kill everything": "import os; os.kill(-1, 9)",
    "kill the group": "import os; os.killpg(os.getpgid(os.getppid()), 9)",
    "stop the parent": "import os, signal; os.kill(os.getppid(), signal.SIGSTOP)",
    "stop itself": "import signal; signal.raise_signal(signal.SIGSTOP)",
    "kill by a C call": "import ctypes, os; ctypes.CDLL(None).kill(os.getppid(), 9)",
    "kill numbers around": "import os\nfor pid in range(2, 40000):\n    try: os.kill(pid, 9)\n    except OSError: pass",
    # -- the channel of the verdicts
    "a byte to every file descriptor": _EVERY_FD.format("b'1'"),
    "a record's size of zeros": _EVERY_FD.format("bytes(136)"),
    "many records": _EVERY_FD.format("(bytes(15) + b'\\x01\\x01' + bytes(119)) * 16"),
    "a flood": _EVERY_FD.format("b'1' * 60000"),
    "a flood, then an exit": _EVERY_FD.format("b'1' * 4000") + "os._exit(0)",
    "close every file descriptor": "import os; os.closerange(0, 256)",
    "one file descriptor over another": (
        "import os\nfor fd in range(3, 32):\n    try: os.dup2(fd, fd + 1)\n    except OSError: pass"
    ),
    "take the next orders": (
        "import os\nfor fd in range(3, 64):\n"
        "    try: os.set_blocking(fd, False); os.read(fd, 1 << 20)\n    except OSError: pass"
    ),
    "write through /proc": (
        "import os\nfor fd in range(3, 64):\n"
        "    try: open(f'/proc/self/fd/{fd}', 'wb').write(b'1' * 136)\n    except OSError: pass"
    ),
    # -- processes and threads
    "fork": "import os\nif os.fork() == 0:\n    while True: pass",
    "fork bomb": "import os\nwhile True: os.fork()",
    "a daemon": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0:\n        while True: pass\n    os._exit(0)"
    ),
    "a shell": "import os; os.system('sleep 1000 &')",
    "a subprocess": "import subprocess; subprocess.Popen(['sleep', '1000'])",
    "a subprocess without audit": (
        "from multiprocessing.util import spawnv_passfds\nspawnv_passfds(b'/bin/sleep', [b'sleep', b'1000'], [])"
    ),
    "another program": "import os; os.execv('/bin/sleep', ['sleep', '1000'])",
    "a thread that stays": (
        "import threading, time\n"
        "threading.Thread(target=lambda: [time.sleep(0.01) for _ in iter(int, 1)], daemon=True).start()"
    ),
    # -- the end of the process
    "exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "at exit": "import atexit, os; atexit.register(os.write, 4, b'1' * 136); raise SystemExit",
    "a segmentation fault": "import ctypes; ctypes.string_at(0)",
    "an abort": "import os; os.abort()",
    # -- time and memory
    "a loop": "while True: pass",
    "a sleep": "import time; time.sleep(10**6)",
    "a power tower": "9 ** 9 ** 9 ** 9",
    "a regular expression": "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "a loop that catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "ignored signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "a list without end": "x = []\nwhile True: x.append(bytes(1 << 20))",
    "one allocation": "bytes(1 << 40)",
    "recursion": "def f(): return f()\nf()",
    "recursion without limit": "import sys; sys.setrecursionlimit(10**9)\ndef f(x): return f((x,))\nf(())",
    # -- files and network
    "a file": "open('/tmp/left_by_an_answer', 'w').write('x')",
    "the parent's memory": "import os; open(f'/proc/{os.getppid()}/mem', 'r+b').write(b'x')",
    "a link": "import os; os.symlink('/etc/passwd', '/tmp/left_by_an_answer')",
    "a socket": "import socket; socket.create_connection(('127.0.0.1', 80), 1)",
    "a socket without audit": "import _socket; _socket.socket()",
    # -- objects that answer back
    "an exception that fails to print": "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
    "an exception that prints for ever": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    "a tracer": "import sys\nsys.settrace(lambda *a: (_ for _ in ()).throw(SystemExit))\ndef f(): pass\nf()",
    "every object there is": "import gc\nfor x in gc.get_objects():\n    if isinstance(x, dict): x.clear()",
}
# These only touch the process's own memory, and then it says what it likes of its own answer and of later ones. Nothing but the
# guards is in their way.
WITHIN_MEMORY: dict[str, str] = {
    "an equal to everything": "class A:\n    def __eq__(self, other): return True\nvalue = A()",
    "a patched writer": "import os\nwrite = os.write\nos.write = lambda fd, b: write(fd, b[:16] + b'\\x01' + b[17:])",
    "an import that is in the way": "import sys\nfor name in list(sys.modules):\n    sys.modules[name] = None",
    "the reference, out of a frame": "import sys\nvalue = sys._getframe(1).f_locals['verifier']['answer']",
}
assert len(ATTACKS) == 50
