"""WebAssembly modules, run by wasmtime where that is installed (sdk/instar_module.h, compiled for wasm32).

A module sees its own memory and the imports from `instar`, nothing else: no WASI, no files but through
`file_read` and `file_list`, no clock but `now`. Its memory, tables and time are bounded by the engine.

  file is WebAssembly, compiles      not-loadable
  imports known, of the right type   no-symbol, wrong-abi
  start function of the file         wasm-trap
  exports: memory, magic, ABI, …     no-symbol, wrong-magic, wrong-abi

wasmtime is no part of the program: it is compiled code. It is looked for in $INSTAR_WASMTIME (a folder that
holds the package), else where the interpreter finds its packages.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from instar.core.errors import InputError, InstarError, MachineError
from instar.modules.context import Context
from instar.runner.adapt import FUNCTIONS, Function, adapt
from instar.runner.calls import Calls
from instar.runner.kinds import ModuleSpec
from instar.runner.wrong import BAD_POINTER, Wrong

ABI, MAGIC = 1, 0x494E5354
FOLDER = "INSTAR_WASMTIME"
HEADER = b"\0asm\1\0\0\0"
MOST_CODE = 64 << 20  # bytes
MOST_TABLE = 100_000  # elements
MOST_STACK = 1 << 20  # bytes
MOST_NAME, MOST_HEALTH = 128, 2_000
MOST_TRAP = 600  # characters of a trap's text in an error; all of it goes to standard error
NEEDED = {"oneshot": ("run",), "service": ("start", "request")}
OPTIONAL = ("step", "ready_to_stop", "stop", "health")
RESULTS = {"step": "D", "stop": "", "health": "I"}  # the others give an int32


def find_wasmtime() -> Any:
    """The package. Raises MachineError `no-wasmtime`, which says how to get it."""
    given = os.environ.get(FOLDER, "")
    if given:
        sys.path.insert(0, given)
    elif "site" not in sys.modules:
        import site

        site.main()
    try:
        return importlib.import_module("wasmtime")
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        way = (
            f"install it for {sys.executable} (pip install wasmtime), or with --target FOLDER, and name that "
            "folder in config.toml: [modules] wasmtime"
        )
        text = f"cannot run a WebAssembly module: expected the Python package wasmtime, got {error!s:.120}; {way}"
        raise MachineError("no-wasmtime", text) from error


def load(module: ModuleSpec, context: Context) -> WasmModule:
    """Raises InstarError with the codes of this file's table."""
    code = _read(module)
    return WasmModule(find_wasmtime(), code, module, context)


def _read(module: ModuleSpec) -> bytes:
    try:
        with open(module.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            code = file.read() if size <= MOST_CODE else b""  # read(most) would reserve it all
    except OSError as error:
        text = f"cannot load the module: expected a file that can be read, got {error.strerror}"
        raise InputError("not-loadable", text) from error
    if not code.startswith(HEADER):
        got = f"{code[:8]!r}" if size <= MOST_CODE else f"{size} bytes"
        text = f"cannot load the module: expected a WebAssembly module of version 1, got {got}"
        raise InputError("not-loadable", text)
    return code


class LinearMemory:
    """The module's memory; asked anew each time, for it moves when it grows."""

    def __init__(self) -> None:
        self.memory: Any = None
        self.store: Any = None

    def read(self, at: int, length: int) -> bytes:
        return ctypes.string_at(self._at(at, length), length)

    def write(self, at: int, data: bytes) -> None:
        ctypes.memmove(self._at(at, len(data)), data, len(data))

    def text(self, at: int, most: int) -> str:
        """A text that ends with a NUL, or with the memory."""
        there = self.memory.data_len(self.store) - at
        return self.read(at, max(0, min(most, there))).partition(b"\0")[0].decode("utf-8", "replace")

    def _at(self, at: int, length: int) -> int:
        if self.memory is None or at + length > self.memory.data_len(self.store):
            text = f"cannot use a pointer: expected the module's own memory, got {length} at {at:#x}"
            raise Wrong(BAD_POINTER, "module-failed", text)
        return ctypes.addressof(self.memory.data_ptr(self.store).contents) + at


class WasmModule:
    """Loaded (runner/kinds.py). After a trap it is never entered again: its stack is in no known state."""

    def __init__(self, engine_of: Any, code: bytes, module: ModuleSpec, context: Context) -> None:
        self._w = engine_of
        self._seconds = module.limits.seconds
        self._broken = ""
        self._memory = LinearMemory()
        self._calls = Calls(context, module.touches.read, module.stateful, _leave)
        self._engine, self._store = _engine(self._w, module.limits.memory)
        self._memory.store = self._store
        self._exports = self._instantiate(self._compile(code))
        self._check(module)

    # --- loading

    def _compile(self, code: bytes) -> Any:
        try:
            return self._w.Module(self._engine, code)
        except self._w.WasmtimeError as error:
            text = f"cannot load the module: expected valid WebAssembly, got {_flat(str(error))}"
            raise InputError("not-loadable", text) from error

    def _instantiate(self, module: Any) -> Any:
        linker = self._w.Linker(self._engine)
        adapted = adapt(self._calls, self._memory)
        table = {function.name: function for function in FUNCTIONS}
        for wanted in module.imports:
            function = table.get(wanted.name or "") if wanted.module == "instar" else None
            if function is None:
                text = f"cannot load the module: expected imports from instar.*, got {wanted.module}.{wanted.name}"
                raise InputError("no-symbol", text)
            kind = self._type(function)
            if not isinstance(wanted.type, self._w.FuncType) or not _same(wanted.type, kind):
                text = f"cannot load the module: expected instar.{function.name} as ABI {ABI} has it, got another type"
                raise InputError("wrong-abi", text)
            linker.define_func("instar", function.name, kind, _unsigned(adapted[function.name], function))
        with self._held():
            try:
                instance = linker.instantiate(self._store, module)
            except self._w.WasmtimeError as error:
                text = f"cannot load the module: expected one within its limits, got {_flat(str(error))}"
                raise InputError("not-loadable", text) from error
        return instance.exports(self._store)

    def _type(self, function: Function) -> Any:
        kinds = {"I": self._w.ValType.i32, "L": self._w.ValType.i64, "D": self._w.ValType.f64}
        takes: list[Any] = []
        for kind in function.takes:
            takes += [kinds["I"](), kinds["I"]()] if kind in "TOB" else [kinds[kind]()]
        return self._w.FuncType(takes, [kinds[function.gives]()])

    def _check(self, module: ModuleSpec) -> None:
        memory = self._exports.get("memory")
        if not isinstance(memory, self._w.Memory):
            raise InputError("no-symbol", "cannot load the module: expected an exported memory, got none")
        self._memory.memory = memory
        for name, expected, code in (("magic", MAGIC, "wrong-magic"), ("abi", ABI, "wrong-abi")):
            found = self._enter(self._function(name, "I")) & 0xFFFFFFFF
            if found != expected:
                text = f"cannot load the module: expected {name} {expected:#x}, got {found:#x}"
                raise InputError(code, text)
        at = self._enter(self._function("name", "I")) & 0xFFFFFFFF
        name = self._memory.text(at, MOST_NAME)
        if name != module.name:
            text = f"cannot load the module: expected one of {module.name}, got one of {name!a:.80}"
            raise InputError("not-loadable", text)
        wanted = (*NEEDED[module.mode], *(OPTIONAL if module.mode == "service" else ()))
        self._functions = {
            name: self._function(name, RESULTS.get(name, "I"), name in OPTIONAL) for name in wanted
        }

    def _function(self, name: str, gives: str, optional: bool = False) -> Any:
        """An export. Raises InputError `no-symbol`, `wrong-abi`."""
        found = self._exports.get(f"instar_{name}")
        if found is None and optional:
            return None
        if not isinstance(found, self._w.Func):
            text = f"cannot load the module: expected the exported function instar_{name}, got none"
            raise InputError("no-symbol", text)
        kinds = {"I": [self._w.ValType.i32()], "D": [self._w.ValType.f64()], "": []}
        if not _same(found.type(self._store), self._w.FuncType([], kinds[gives])):
            text = f"cannot load the module: expected instar_{name} as ABI {ABI} has it, got another type"
            raise InputError("wrong-abi", text)
        return found

    # --- calls

    def run(self, args: dict[str, Any], context: Context) -> dict[str, Any]:
        return self._ask("run", args, "run the module")

    def start(self, context: Context) -> None:
        self._ask("start", context.args, "start the module")

    def request(self, args: dict[str, Any], context: Context) -> dict[str, Any]:
        return self._ask("request", args, "answer the request")

    def step(self, context: Context) -> float | None:
        wanted = self._tell("step", -1.0)
        return wanted if wanted >= 0 else None

    def ready_to_stop(self, context: Context) -> bool:
        return bool(self._tell("ready_to_stop", 1))

    def stop(self, context: Context) -> None:
        self._tell("stop", None)

    def health(self, context: Context) -> str:
        at = self._tell("health", 0) & 0xFFFFFFFF
        return self._memory.text(at, MOST_HEALTH) if at else ""

    def _ask(self, name: str, args: dict[str, Any], what: str) -> dict[str, Any]:
        self._calls.begin(args)
        returned = self._enter(self._functions[name])
        return self._calls.finish(returned, what)

    def _tell(self, name: str, otherwise: Any) -> Any:
        function = self._functions.get(name)
        if function is None:
            return otherwise
        self._calls.begin({})
        answer = self._enter(function)
        self._calls.raise_mistake()
        return answer

    def _enter(self, function: Any) -> Any:
        if self._broken:
            raise InstarError(
                "wasm-trap", f"cannot go on with the module: it was left before: {self._broken}"
            )
        with self._held():
            return function(self._store)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Around everything that runs the module's code: bounded in time, and a trap becomes `wasm-trap`."""
        self._store.set_epoch_deadline(1)
        timer = threading.Timer(self._seconds, self._engine.increment_epoch)
        timer.daemon = True
        timer.start()
        try:
            yield
        except self._w.Trap as trap:
            print(trap, file=sys.stderr, flush=True)
            self._broken = self._why(trap)
            raise InstarError(
                "wasm-trap", f"cannot run the module: expected it to return, got a trap: {self._broken}"
            ) from trap
        except InstarError as error:
            self._broken = self._broken or error.text  # left in the middle of it
            raise
        finally:
            timer.cancel()
            timer.join()

    def _why(self, trap: Any) -> str:
        code = getattr(trap, "trap_code", None)
        if code is not None and code == getattr(self._w.TrapCode, "INTERRUPT", None):
            return f"interrupted after {self._seconds:g} s"
        words = str(trap)
        return _flat(words.partition("Caused by:")[2] or words)


def _engine(w: Any, memory: int) -> tuple[Any, Any]:
    """An engine and a store with their bounds; `memory` in bytes, 0: none but 4 GiB."""
    config = w.Config()
    config.epoch_interruption = True
    config.parallel_compilation = False  # no threads of its own in a process that is bounded
    config.max_wasm_stack = MOST_STACK
    config.wasm_threads = False
    config.wasm_memory64 = False
    engine = w.Engine(config)
    store = w.Store(engine)
    store.set_limits(memory_size=memory or -1, table_elements=MOST_TABLE, instances=1, tables=8, memories=1)
    return engine, store


def _leave(error: InstarError) -> NoReturn:
    """Out of the module's code: the engine unwinds it, and raises this where it was entered."""
    raise error


def _unsigned(function: Callable[..., Any], described: Function) -> Callable[..., Any]:
    """WebAssembly's i32 has no sign, wasmtime's Python gives it one: pointers and lengths lose it again."""
    places: list[bool] = []
    for kind in described.takes:
        places += [True, True] if kind in "TOB" else [False]

    def call(*raw: int) -> Any:
        return function(
            *(value & 0xFFFFFFFF if place else value for value, place in zip(raw, places, strict=True))
        )

    return call


def _same(one: Any, other: Any) -> bool:
    def words(kinds: Any) -> list[str]:
        return [str(kind) for kind in kinds]

    return words(one.params) == words(other.params) and words(one.results) == words(other.results)


def _flat(text: str) -> str:
    return " ".join(text.split())[:MOST_TRAP]
