"""Whether a path can be read as a file or folder, asked without opening what would never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

NO_SUCH_FILE = "No such file or directory"
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def problem_of_file(path: Path, max_bytes: int | None = None) -> str | None:
    """Why `path` cannot be read as a file, as the rest of a sentence; None where it can. Pipes and devices are not files."""
    try:
        found = path.stat()
    except OSError as error:
        return f"{os.strerror(error.errno or 0)}; correct the path"
    except ValueError:  # a NUL
        return "no file has such a name; correct the path"
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        return "Is a directory; name a file"
    if kind != stat.S_IFREG:
        return f"it is {_KINDS.get(kind, 'no file')}; name a file"
    if not os.access(path, os.R_OK):
        return "Permission denied; change its rights"
    if max_bytes is not None and found.st_size > max_bytes:
        return f"it has {found.st_size:,} bytes, and {max_bytes:,} are the most; name the right file"
    return None


def problem_of_folder(path: Path) -> str | None:
    """Why what is in the folder `path` cannot be read, as the rest of a sentence; None where it can, or where it is none."""
    try:
        is_folder = path.is_dir()
    except OSError as error:
        return f"{os.strerror(error.errno or 0)}; change the rights of the folders above"
    if is_folder and not os.access(path, os.R_OK | os.X_OK):
        return "Permission denied; change its rights"
    return None
