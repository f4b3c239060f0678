"""The modules that ride in the program. `BUILT_IN` is all that a job can name without a digest.

A module has `run(args, context)` and returns its reply, an object of JSON values.
"""

from __future__ import annotations

BUILT_IN = ("selftest",)
