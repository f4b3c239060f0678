"""`runner`: do one thing with one module (work.py), told through descriptor 3. `runner --warm`: fork such runners.

Import diet: standard library, and the file for the module's kind.
"""

from __future__ import annotations

import os
import sys

from instar.core.errors import InputError
from instar.runner.border import leave


def main(argv: list[str]) -> int:
    program = os.path.realpath(sys.argv[0])
    try:
        os.fstat(3)
    except OSError:
        print("cannot run: expected the control line on descriptor 3, got nothing there", file=sys.stderr)
        return InputError.exit_status
    if argv == ["--warm"]:
        from instar.runner.warm import serve

        return serve(program)
    if argv:
        print("cannot run: expected no arguments or --warm, the job comes on descriptor 3", file=sys.stderr)
        return InputError.exit_status
    from instar.runner.bounds import settle
    from instar.runner.work import work

    settle()
    return leave(work(program))
