"""What the pool and its workers say to each other; free of imports, so that neither side drags in the other's."""

from __future__ import annotations

READY = b"ready"
CORRECT = b"1"
INCORRECT = b"0"
ERROR = b"!"  # followed by the exception
MAX_REPLY_BYTES = 1024
