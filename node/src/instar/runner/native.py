"""Native modules: a shared library that exports `instar_module_v1` (sdk/instar_module.h).

In this order, so that each failure has its own code and nothing of the library runs before the last one:

  ELF header        not-loadable, wrong-machine    (the file is read, not loaded)
  dlopen            not-loadable                   (its constructors run here: they are its own code)
  the symbol        no-symbol
  magic, ABI, size  wrong-magic, wrong-abi
  name, functions   not-loadable, no-symbol

What makes a load quick is made at import: the fork server imports this file once, before the first fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable
from typing import Any, NoReturn, cast

from instar.core.errors import InputError, InstarError
from instar.modules.context import Context
from instar.runner.adapt import FUNCTIONS, adapt
from instar.runner.border import leave, tell
from instar.runner.calls import Calls
from instar.runner.elf import check_library
from instar.runner.elf import warm_up as warm_elf
from instar.runner.kinds import ModuleSpec
from instar.runner.wrong import BAD_POINTER, Wrong

ABI = 1
MODULE_MAGIC, HOST_MAGIC = 0x494E5354, 0x484F5354
SYMBOL = "instar_module_v1"
NOW_LOCAL = os.RTLD_NOW | os.RTLD_LOCAL
MOST_NAME = 128  # bytes of a name in the descriptor
MOST_HEALTH = 2_000

_C: dict[str, Any] = {"L": ctypes.c_int64, "I": ctypes.c_int32, "D": ctypes.c_double}
_POINTER = (ctypes.c_void_p, ctypes.c_uint32)  # with its length


def _prototype(takes: str, gives: str) -> Any:
    types: list[Any] = [ctypes.c_void_p]  # self
    for kind in takes:
        types += _POINTER if kind in "TOB" else [_C[kind]]
    return ctypes.CFUNCTYPE(_C[gives], *types)


_PROTOTYPES = [(function.name, _prototype(function.takes, function.gives)) for function in FUNCTIONS]
_INT = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)
_DOUBLE = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_void_p)
_NOTHING = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_ADDRESS = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)  # not c_char_p: where it leads is checked first


class HostStruct(ctypes.Structure):
    """struct instar_host"""

    _fields_ = [
        ("magic", ctypes.c_uint32),
        ("abi", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("self", ctypes.c_void_p),
        *_PROTOTYPES,
    ]


class ModuleStruct(ctypes.Structure):
    """struct instar_module"""

    _fields_ = [
        ("magic", ctypes.c_uint32),
        ("abi", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("name", ctypes.c_void_p),
        ("version", ctypes.c_void_p),
        ("run", _INT),
        ("start", _INT),
        ("step", _DOUBLE),
        ("request", _INT),
        ("ready_to_stop", _INT),
        ("stop", _NOTHING),
        ("health", _ADDRESS),
    ]


class _Piece(ctypes.Structure):
    """struct iovec"""

    _fields_ = [("at", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_ONE = ctypes.c_ulong(1)
_NONE = ctypes.c_ulong(0)


def _copier(name: str) -> Callable[..., int]:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    piece = ctypes.POINTER(_Piece)
    function.argtypes = [ctypes.c_int, piece, ctypes.c_ulong, piece, ctypes.c_ulong, ctypes.c_ulong]
    function.restype = ctypes.c_ssize_t
    return cast(Callable[..., int], function)


_readv, _writev = _copier("process_vm_readv"), _copier("process_vm_writev")


class OwnMemory:
    """This process's memory, read and written by a system call that fails where a plain access would crash."""

    def __init__(self) -> None:
        probe = ctypes.create_string_buffer(1)
        # A container may forbid the call: then a wild pointer crashes this process, as it would without us.
        self._checked = self._copy(_readv, ctypes.create_string_buffer(1), ctypes.addressof(probe), 1)

    def read(self, at: int | None, length: int) -> bytes:
        buffer = ctypes.create_string_buffer(length)
        if not at or (self._checked and not self._copy(_readv, buffer, at, length)):
            raise _wild(at, length)
        return buffer.raw if self._checked else ctypes.string_at(at, length)

    def write(self, at: int | None, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(data, len(data))
        if not at or (self._checked and not self._copy(_writev, buffer, at, len(data))):
            raise _wild(at, len(data))
        if not self._checked:
            ctypes.memmove(at, data, len(data))

    def text(self, at: int, most: int) -> str:
        """A text that ends with a NUL, read in steps that stay on one page. Raises Wrong BAD_POINTER."""
        found = b""
        while len(found) < most:
            step = min(most - len(found), 4096 - (at + len(found)) % 4096, 64)
            piece, nul, _ = self.read(at + len(found), step).partition(b"\0")
            found += piece
            if nul:
                break
        return found.decode("utf-8", "replace")

    def _copy(self, call: Callable[..., int], buffer: Any, at: int, length: int) -> bool:
        ours, theirs = _Piece(ctypes.addressof(buffer), length), _Piece(at, length)
        # Asked each time: a child that the module forked must not read its parent's memory.
        return call(os.getpid(), ctypes.byref(ours), _ONE, ctypes.byref(theirs), _ONE, _NONE) == length


def warm_up() -> None:
    """Walk the way of `load` without a library. The first callback of a process costs half a millisecond."""
    memory = OwnMemory()
    probe = ctypes.create_string_buffer(b"x", 2)
    memory.text(ctypes.addressof(probe), 2)
    kept = [kind(lambda *_: 0) for _, kind in _PROTOTYPES]
    HostStruct(HOST_MAGIC, ABI, ctypes.sizeof(HostStruct), 0, None, *kept)
    warm_elf()
    descriptor = ModuleStruct(MODULE_MAGIC, ABI, ctypes.sizeof(ModuleStruct))
    described = _describe(memory, ctypes.addressof(descriptor))
    calls = Calls(Context("x", "0", lambda _: None, "", "", {}), (), False, _leave)
    module = NativeModule(None, described, calls, memory)
    calls.begin({})
    calls.raise_mistake()
    del module


def load(module: ModuleSpec, context: Context) -> NativeModule:
    """Raises InputError with the codes of this file's table."""
    check_library(module.path)
    try:
        library = ctypes.CDLL(module.path, mode=NOW_LOCAL)
    except OSError as error:
        words = str(error).replace(module.folder, module.home)
        text = f"cannot load the module: expected its symbols and libraries to be found, got {words:.300}"
        raise InputError("not-loadable", text) from error
    try:
        head = ctypes.c_uint32.in_dll(library, SYMBOL)
    except ValueError as error:
        text = f"cannot load the module: expected the symbol {SYMBOL}, got a library without it"
        raise InputError("no-symbol", text) from error
    memory = OwnMemory()
    described = _describe(memory, ctypes.addressof(head))
    _check_name(memory, described, module)
    for needed in ("run",) if module.mode == "oneshot" else ("start", "request"):
        if not getattr(described, needed):
            text = f"cannot load the module: expected a {module.mode} module with '{needed}', got none"
            raise InputError("no-symbol", text)
    calls = Calls(context, module.touches.read, module.stateful, _leave)
    return NativeModule(library, described, calls, memory)


def _leave(error: InstarError) -> NoReturn:
    """End this process from within a callback, with its last line: C has no other way out of a loop."""
    from instar.runner.line import ControlLine

    tell(error.text)
    with contextlib.suppress(InstarError, OSError):
        ControlLine().say({"ok": False, "error": error.as_json()})
    leave(error.exit_status)


def _describe(memory: OwnMemory, at: int) -> ModuleStruct:
    """A copy of the descriptor: what a later version added is left out, what an older one lacks is zero."""
    try:
        magic, abi, size, _ = struct.unpack("=4I", memory.read(at, 16))
        if magic != MODULE_MAGIC:
            text = f"cannot load the module: expected the magic number {MODULE_MAGIC:#x}, got {magic:#x}"
            raise InputError("wrong-magic", text)
        known = ctypes.sizeof(ModuleStruct)
        if abi != ABI or size < known:
            text = f"cannot load the module: expected ABI {ABI} of {known} bytes, got {abi} of {size}"
            raise InputError("wrong-abi", text)
        return ModuleStruct.from_buffer_copy(memory.read(at, known))
    except Wrong as wrong:
        text = "cannot load the module: expected a descriptor in its data, got a symbol that leads nowhere"
        raise InputError("wrong-magic", text) from wrong


def _check_name(memory: OwnMemory, described: ModuleStruct, module: ModuleSpec) -> None:
    try:
        name = memory.text(described.name or 0, MOST_NAME)
    except Wrong:
        name = ""
    if name != module.name:
        text = f"cannot load the module: expected a library of {module.name}, got one of {name!a:.80}"
        raise InputError("not-loadable", text)


class NativeModule:
    """Loaded (runner/kinds.py). One call at a time; the callbacks live as long as this."""

    def __init__(self, library: Any, described: ModuleStruct, calls: Calls, memory: OwnMemory) -> None:
        self._library = library  # keeps it loaded
        self._described = described
        self._calls = calls
        self._memory = memory
        functions = adapt(calls, memory)
        self._callbacks = [kind(_without_self(functions[name])) for name, kind in _PROTOTYPES]
        self._host = HostStruct(HOST_MAGIC, ABI, ctypes.sizeof(HostStruct), 0, None, *self._callbacks)

    def run(self, args: dict[str, Any], context: Context) -> dict[str, Any]:
        return self._ask(self._described.run, args, "run the module")

    def start(self, context: Context) -> None:
        self._ask(self._described.start, context.args, "start the module")

    def request(self, args: dict[str, Any], context: Context) -> dict[str, Any]:
        return self._ask(self._described.request, args, "answer the request")

    def step(self, context: Context) -> float | None:
        wanted = self._tell(self._described.step, -1.0)
        return wanted if wanted >= 0 else None

    def ready_to_stop(self, context: Context) -> bool:
        return bool(self._tell(self._described.ready_to_stop, 1))

    def stop(self, context: Context) -> None:
        self._tell(self._described.stop, None)

    def health(self, context: Context) -> str:
        at = self._tell(self._described.health, None)
        try:
            return self._memory.text(at, MOST_HEALTH) if at else ""
        except Wrong as wrong:
            raise wrong.error("health") from wrong

    def _ask(self, function: Any, args: dict[str, Any], what: str) -> dict[str, Any]:
        self._calls.begin(args)
        return self._calls.finish(function(ctypes.addressof(self._host)), what)

    def _tell(self, function: Any, otherwise: Any) -> Any:
        if not function:
            return otherwise
        self._calls.begin({})
        answer = function(ctypes.addressof(self._host))
        self._calls.raise_mistake()
        return answer


def _without_self(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _self, *raw: function(*raw)


def _wild(at: int | None, length: int) -> Wrong:
    got = f"{length} at {at or 0:#x}"
    return Wrong(
        BAD_POINTER, "module-failed", f"cannot use a pointer: expected the module's own memory, got {got}"
    )
