"""The border between the runner and a module: whatever a module raises becomes an error with a code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from instar.core.errors import InstarError

T = TypeVar("T")
LOST = 1  # exit status of a child of the module that came back to the runner's code


def call(doing: str, function: Callable[..., T], *args: object) -> T:
    """`function(*args)`, which is the module's. `doing` completes 'cannot …'.

    Raises InstarError: the module's own, `out-of-memory`, or `module-failed` for anything else, with the
    traceback on standard error. A child that the module forked and that comes back here ends here.
    """
    pid = os.getpid()
    try:
        return function(*args)
    except InstarError:
        raise
    except MemoryError:
        text = f"cannot {doing}: the module wanted more memory than its limit"
        raise InstarError("out-of-memory", text) from None
    except BaseException as error:  # a module may raise anything, SystemExit too
        if os.getpid() == pid:  # in a child, sys.exit is how it ends
            show(error)
        text = f"cannot {doing}: the module raised {type(error).__name__}: {words_of(error)}"
        raise InstarError("module-failed", text) from error
    finally:
        if os.getpid() != pid:
            leave(LOST)


def show(error: BaseException) -> None:
    """The traceback, on standard error, if there is still one to write to."""
    with contextlib.suppress(Exception):
        import traceback

        traceback.print_exception(error)


def words_of(error: BaseException) -> str:
    """What an error says, if it can say anything."""
    with contextlib.suppress(Exception):
        return str(error)[:200]
    return "(an error that cannot be shown)"


def tell(text: str) -> None:
    """A line on standard error, for the tail that the agent keeps."""
    with contextlib.suppress(Exception):
        print(text, file=sys.stderr)


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may be closed, gone, or the module's own
            stream.flush()


def leave(status: int) -> NoReturn:
    """End this process now: no exit handlers, no threads of the module to wait for."""
    flush()
    os._exit(status)
