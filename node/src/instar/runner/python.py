"""Python modules: one file that is executed in a namespace of its own, its folder first on the path.

The entry is compiled here, not imported: that saves the import system's searching, and nothing is written
beside it. The fork server may hold the code from an earlier run of the same bytes (`warm.py`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from types import CodeType, ModuleType
from typing import Any

from instar.core.errors import InstarError
from instar.modules.context import Context
from instar.runner.border import show, words_of
from instar.runner.kinds import ModuleSpec

NAME = "instar_module"  # what the module's own `__name__` is
NEEDED = {"oneshot": ("run",), "service": ("start", "request")}
MOST_SOURCE = 16 << 20  # bytes
MOST_HELD, MOST_FILES = 256 << 10, 32  # bytes of a source whose code is held, and how many of them

# (SHA-256 of the source, shown path) -> its code. Only the fork server adds to it, between two forks.
held: dict[tuple[str, str], CodeType] = {}


class PythonModule:
    """A loaded module; see kinds.Loaded."""

    def __init__(self, space: ModuleType) -> None:
        self._space = space

    def run(self, args: dict[str, Any], context: Context) -> dict[str, Any] | None:
        reply: dict[str, Any] | None = self._space.run(args, context)
        return reply

    def start(self, context: Context) -> None:
        self._space.start(context)

    def request(self, args: dict[str, Any], context: Context) -> dict[str, Any] | None:
        reply: dict[str, Any] | None = self._space.request(args, context)
        return reply

    def step(self, context: Context) -> float | None:
        step = getattr(self._space, "step", None)
        return None if step is None else step(context)

    def ready_to_stop(self, context: Context) -> bool:
        ask = getattr(self._space, "ready_to_stop", None)
        return True if ask is None else bool(ask(context))

    def stop(self, context: Context) -> None:
        stop = getattr(self._space, "stop", None)
        if stop is not None:
            stop(context)

    def health(self, context: Context) -> str:
        health = getattr(self._space, "health", None)
        return "" if health is None else str(health(context))


def load(module: ModuleSpec, context: Context) -> PythonModule:
    """Execute the module's file. Raises InstarError `not-loadable`, `no-symbol`, `out-of-memory`."""
    shown = f"{module.home}/{module.entry}"
    code = _code(module, shown)
    program = os.path.abspath(sys.path[0]) if sys.path else ""
    sys.path[:] = [module.folder, *(path for path in sys.path if os.path.abspath(path) != program)]
    space = ModuleType(NAME)
    space.__file__ = shown
    sys.modules[NAME] = space  # dataclasses and pickle look their module up
    try:
        exec(code, space.__dict__)  # noqa: S102  this is what a runner is for; the agent has checked the file
    except (InstarError, MemoryError):
        raise
    except BaseException as error:  # a module may raise anything
        show(error)
        text = f"cannot load module {module.name}: it raised {type(error).__name__}: {words_of(error)}"
        raise InstarError("not-loadable", text) from error
    for name in NEEDED[module.mode]:
        if not callable(getattr(space, name, None)):
            text = (
                f"cannot load module {module.name}: expected a function {name!r} in {module.entry}, got none"
            )
            raise InstarError("no-symbol", text)
    return PythonModule(space)


def _code(module: ModuleSpec, shown: str) -> CodeType:
    try:
        with open(module.path, "rb") as file:
            # No more than there is: reading sets aside as much memory as it is asked for.
            source = file.read(min(os.fstat(file.fileno()).st_size + 1, MOST_SOURCE))
    except OSError as error:
        text = f"cannot load module {module.name}: {module.entry}: {error.strerror}"
        raise InstarError("not-loadable", text) from error
    code = held.get((hashlib.sha256(source).hexdigest(), shown)) if held else None
    if code is not None:
        return code
    try:
        return compile(source, shown, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        text = f"cannot load module {module.name}: {words_of(error)}"
        raise InstarError("not-loadable", text) from error


def hold(path: str, shown: str) -> None:
    """Keep the code of `path` for later runs: read and compiled, nothing of it is run. For the fork server.

    Keyed by the bytes themselves: a file that has changed is compiled again by whoever runs it. Raises
    OSError, and what `compile` raises.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        source = file.read(MOST_HELD + 1)
    key = (hashlib.sha256(source).hexdigest(), shown)
    if len(source) > MOST_HELD or key in held:
        return
    while len(held) >= MOST_FILES:
        held.pop(next(iter(held)))
    held[key] = compile(source, shown, "exec", dont_inherit=True)
