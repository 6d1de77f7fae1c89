"""How a job's script is filled in."""

from __future__ import annotations

import string


class JobTemplate(string.Template):
    """Placeholders are `@@{name}`, so that the shell's own `$` stays as it is."""

    delimiter = "@@"
