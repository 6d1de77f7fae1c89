"""What the pool, its workers and their graders say to each other; free of imports of ours, so that no side drags in another's.

Everything that comes back from a process that has seen an answer is a record of fixed size, never a pickle. A record names
what it answers, so that bytes out of turn are noticed instead of shifting every later verdict by one.
"""

from __future__ import annotations

import struct

READY = b"ready"  # followed by the lines of defence, as text
USELESS = b"useless"  # followed by why there will never be a grader, as text

# A worker's answer to the pool: the item's running number, a verdict, the values of reward functions, the exception if it is
# an error. A grader's answer to its worker: the same, with a number that nobody can guess in front.
REPLY = struct.Struct("!QB64s183s")
RECORD = struct.Struct("!8sQB64s183s")
MAX_NOTE = 183
MAX_VALUES = 8

CORRECT = 1
INCORRECT = 0
ERROR = 2  # the grader raised
TIMED_OUT = 3  # its process was ended when the answer's time was up
DIED = 4  # its process ended, or wrote what was not asked of it

# A chunk of work: the running number of its first item, how many there are, and then a pickled list of
# (response, pickled verifier). The pool packs it, the grader unpacks it; the worker in between only passes it on.
CHUNK = struct.Struct("!QI")
# The worker puts this in front of a chunk: the unguessable number, the place in the chunk to begin at, the chunk's bytes.
ORDER = struct.Struct("!8sII")
MAX_REPLIES_BYTES = 1 << 16
