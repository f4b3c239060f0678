"""What a module looks like to the runner, whatever it is written in.

Each kind has a file here with

    def load(module: ModuleSpec, context: Context) -> Loaded

`python.py`, `native.py`, `wasm.py`. `load` finds the code, checks it (symbols, magic, ABI, machine) and runs
as little of it as can be; it raises InstarError with one of the contract's codes (`no-symbol`, `wrong-magic`,
`wrong-abi`, `wrong-machine`, `not-loadable`, `no-wasmtime`, …). A module of mode `oneshot` must have `run`,
one of mode `service` `start` and `request`; `load` refuses one that has not (`no-symbol`).

Limits, Landlock, the user, environment and working folder are set after the kind's file was imported and before
`load` is called. So such a file imports at its top what it needs of the program: another user may not be able
to read the program's file any more.

What the methods of Loaded raise: InstarError with a code of its own (`module-failed`, `wasm-trap`, …) when the
module said that it failed. Anything else that is raised (any BaseException) becomes `module-failed`, MemoryError
`out-of-memory`, with the traceback on standard error. What they return is checked by the caller
(`bad-reply`); a reply is a dict of JSON values, or None for what was built with `context.put` and `context.text`.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, Protocol, cast

from instar.core.errors import MachineError
from instar.modules.context import Context

KINDS = ("python", "native", "wasm")


class Limits(NamedTuple):
    """Bytes and counts, as in the module's manifest; 0: none. `seconds`: for one run."""

    seconds: float = 60.0
    memory: int = 256 << 20
    processes: int = 32
    files: int = 256
    cpu_s: int = 0
    disk: int = 64 << 20
    output: int = 1 << 20


class Touches(NamedTuple):
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    network: bool = False


class ModuleSpec(NamedTuple):
    """The module that this process was started for.

    `folder` is where its files are read from now (below /proc/self/fd for another user); `home` is the same
    folder's true path, for people and tracebacks. `entry` is relative to both.
    """

    name: str
    version: str
    digest: str
    folder: str
    home: str
    runs: str  # python | native | wasm | builtin
    mode: str  # oneshot | service
    entry: str
    stateful: bool
    limits: Limits
    touches: Touches

    @property
    def path(self) -> str:
        """The file to load."""
        return f"{self.folder}/{self.entry}"


class Loaded(Protocol):
    """A module that was loaded. All calls come from one thread, never one within another."""

    def run(self, args: dict[str, Any], context: Context) -> dict[str, Any] | None:
        """One-shot: do the work, return the reply."""

    def start(self, context: Context) -> None:
        """Service: called once, before all others; state is found with `context.load()`."""

    def request(self, args: dict[str, Any], context: Context) -> dict[str, Any] | None:
        """Service: answer one question."""

    def step(self, context: Context) -> float | None:
        """Service: a slice of its own work; seconds until it wants the next one, None: never again."""

    def ready_to_stop(self, context: Context) -> bool:
        """Service: whether no operation is under way. True when the module does not say."""

    def stop(self, context: Context) -> None:
        """Service: the last call; what must be kept is saved when it returns."""

    def health(self, context: Context) -> str:
        """Service: '' when well, else what is wrong."""


class Kind(Protocol):
    def load(self, module: ModuleSpec, context: Context) -> Loaded: ...


def find(module: ModuleSpec) -> Kind:
    """The file for the module's kind. Raises MachineError `not-loadable` where Python lacks what it needs."""
    try:
        return cast(Kind, importlib.import_module(f"instar.runner.{module.runs}"))
    except ImportError as error:
        text = f"cannot load a {module.runs} module: this Python lacks a part: {error}"
        raise MachineError("not-loadable", text) from error
