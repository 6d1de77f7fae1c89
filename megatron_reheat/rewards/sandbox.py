"""What a grader's process may do: nothing that grading does not need.

The first line of defence is that no answer is evaluated (`guards`). The lines here are for the day that fails: an
answer that runs code all the same should reach nothing outside its process. From the outside in: namespaces of its own
(no process outside can be named, no network), limits on resources, a filter of system calls (libseccomp, where the
machine has it), and an audit hook that refuses to compile text or to use the operating system. None of them keeps code
that runs in a grader from spoiling that grader's own verdicts; the worker replaces a grader as soon as it notices.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import sys
import types
from typing import Any

import psutil

MEMORY_BYTES = 4 * 2**30
OPEN_FILES = 64

_libc = ctypes.CDLL(None, use_errno=True)


# -- namespaces --------------------------------------------------------------------------------------------------------

_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000


def enter_namespaces() -> str:
    """Gives this process's children namespaces of their own and names these; nothing if the kernel allows none.

    The first child is process 1 in there: it cannot name any process outside, and when it ends the kernel ends every
    process inside.
    """
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWPID | _CLONE_NEWNET) == 0:
        return "user, process and network namespaces"
    return "user and process namespaces" if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWPID) == 0 else ""


_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant that loses its own, so that `end_descendants` finds it."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants() -> dict[int, int]:
    """Kills and reaps all of them; their exit statuses by process number. Not for a process 1 of a namespace.

    /proc may be that of the namespace outside, where other processes have the numbers of those in here.
    """
    assert os.getpid() != 1
    statuses: dict[int, int] = {}
    while True:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return statuses
        statuses[pid] = os.waitstatus_to_exitcode(status)


def end_namespace() -> None:
    """Kills and reaps every other process of the namespace whose process 1 this is."""
    assert os.getpid() == 1
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


# -- resources ---------------------------------------------------------------------------------------------------------


def limit_resources() -> None:
    """For good: memory, no output to files, no further processes (for any user but root), few open files."""
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
    }
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


# -- system calls ------------------------------------------------------------------------------------------------------

_KILL, _ALLOW, _REFUSE = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM
_EQUAL, _MASKED_EQUAL = 4, 7

_NEEDED = (
    "brk mmap munmap mremap mprotect madvise read pread64 readv lseek close fstat stat lstat newfstatat statx access "
    "faccessat faccessat2 readlink readlinkat getcwd getdents64 fcntl dup futex rt_sigaction rt_sigprocmask rt_sigreturn "
    "sigaltstack restart_syscall poll ppoll select pselect6 clock_gettime clock_getres gettimeofday time times "
    "clock_nanosleep nanosleep getrandom getpid gettid getuid geteuid getgid getegid getrusage sched_yield "
    "sched_getaffinity rseq set_robust_list exit exit_group"
)
# No grader has a use for these; one that calls them is not to answer anything any more.
_FATAL = (
    "fork vfork clone clone3 execve execveat kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal "
    "pidfd_open pidfd_getfd ptrace process_vm_readv process_vm_writev kcmp socket socketpair connect bind listen accept "
    "accept4 sendto sendmsg sendmmsg prctl unshare setns mount umount2 pivot_root chroot bpf userfaultfd "
    "perf_event_open io_uring_setup memfd_create keyctl add_key request_key init_module finit_module kexec_load reboot "
    "swapon unlink unlinkat rename renameat renameat2 rmdir mkdir mkdirat link linkat symlink symlinkat mknod mknodat "
    "chmod fchmod fchmodat chown fchown fchownat truncate ftruncate setuid setgid setresuid setresgid setpgid setsid"
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class _Comparison(ctypes.Structure):
    """libseccomp's `struct scmp_arg_cmp`."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


class SystemCallFilter:
    """A filter that allows what grading needs, refuses other system calls and ends the process at hostile ones."""

    def __init__(self) -> None:
        """Raises OSError where the machine has no libseccomp or its kernel no filters."""
        self._library = ctypes.CDLL("libseccomp.so.2")
        self._library.seccomp_version.restype = ctypes.POINTER(ctypes.c_uint * 3)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._library.seccomp_init.argtypes = [ctypes.c_uint32]
        self._library.seccomp_rule_add_array.argtypes = [
            *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Comparison))
        ]
        self._library.seccomp_load.argtypes = [ctypes.c_void_p]
        self.name = f"system call filter (libseccomp {'.'.join(map(str, self._library.seccomp_version().contents))})"
        self._context = self._library.seccomp_init(_REFUSE)
        if not self._context:
            raise OSError("libseccomp made no filter")
        for name in _NEEDED.split():
            self._add(_ALLOW, name)
        for name in _FATAL.split():
            self._add(_KILL, name)
        self._add(_ALLOW, "openat", _Comparison(2, _MASKED_EQUAL, _WRITING, 0))
        self._add(_ALLOW, "open", _Comparison(1, _MASKED_EQUAL, _WRITING, 0))

    def load(self, writable: int) -> None:
        """For good, on this thread and what it starts; only the file descriptor `writable` can be written to.

        Raises OSError if the kernel refuses the filter.
        """
        self._add(_ALLOW, "write", _Comparison(0, _EQUAL, writable, 0))
        if (failure := self._library.seccomp_load(self._context)) != 0:
            raise OSError(-failure, os.strerror(-failure))

    def _add(self, action: int, name: str, *comparisons: _Comparison) -> None:
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:  # no such call on this architecture, or not known to this libseccomp
            return
        array = (_Comparison * len(comparisons))(*comparisons)
        failure = self._library.seccomp_rule_add_array(self._context, action, number, len(comparisons), array)
        if failure != 0:
            raise OSError(-failure, f"{name}: {os.strerror(-failure)}")


# -- Python ------------------------------------------------------------------------------------------------------------

_REFUSED = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pty.",
    "signal.",
    "fcntl.",
    "mmap.",
    "resource.",
    "gc.",
)
_NEEDED_BY_IMPORTS = ("os.listdir", "os.scandir")

# Who must not have text evaluated in a process that grades: that would be a hole in the guards. (Others compile code of their
# own: imports, dataclasses, sympy's polynomials and constants.)
_GRADERS = ("megatron_reheat.", "reasoning_gym.", "math_verify.", "latex2sympy2_extended.")
_ON_BEHALF_OF_THEIR_CALLER = ("sympy.parsing.", "sympy.core.sympify", "sympy.core.singleton")
# This one evaluates the data's own problem, never an answer.
_OF_PROBLEMS = "reasoning_gym.arithmetic.bitwise_arithmetic"


def refuse_side_effects() -> None:
    """For good: an audit hook raises PermissionError at what no grader needs. The last line, not the strongest."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        refused = bool(arguments[2] & _WRITING)
    elif event == "compile":
        module = _asks_for_evaluation()
        refused = module.startswith(_GRADERS) and module != _OF_PROBLEMS
    else:
        refused = event.startswith(_REFUSED) and event not in _NEEDED_BY_IMPORTS
    if refused:
        raise PermissionError(f"a grader may not use {event}")


def _asks_for_evaluation() -> str:
    """The module that calls `eval` or the like, or calls sympy's parser, which calls that."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if not module.startswith(_ON_BEHALF_OF_THEIR_CALLER):
            return module
        frame = frame.f_back
    return ""
