"""Look at a shared library's ELF header before anything of it is loaded: is it one, whole, and for this machine?

The loader's own words for a library of another machine differ from libc to libc; here the answer is a
stable code. What this process itself was loaded from says what it can load, so a 32-bit interpreter on a
64-bit kernel is told right, which `uname -m` cannot.
"""

from __future__ import annotations

import contextlib
import os
import struct
from functools import cache
from typing import NamedTuple

from instar.core.errors import InputError

MACHINES = {
    3: "i386", 8: "mips", 20: "ppc", 21: "ppc64", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64",
    243: "riscv", 258: "loongarch64",
}  # fmt: skip
SHARED = 3  # ET_DYN
LOAD = 1  # PT_LOAD
OWN = "/proc/self/exe"
HEAD = 64  # bytes; a 32-bit header has 52
MOST_SEGMENTS = 256


class Kind(NamedTuple):
    """What must be equal for one to be loaded into the other."""

    bits: int
    order: str  # '<' little-endian, '>' big-endian
    machine: int

    def __str__(self) -> str:
        order = "little" if self.order == "<" else "big"
        return f"{MACHINES.get(self.machine, f'machine {self.machine}')}, {self.bits}-bit {order}-endian"


def check_library(path: str) -> None:
    """Raise InputError `not-loadable` or `wrong-machine` unless `path` is a shared library for this process."""
    try:
        found = read_kind(path, library=True)
    except OSError as error:
        raise _unusable(f"a file that can be read, got {error.strerror}") from error
    own = own_kind()
    if own is not None and found != own:
        text = f"cannot load the module: expected a library for {own}, got one for {found}"
        raise InputError("wrong-machine", text)


@cache
def own_kind() -> Kind | None:
    """What this process is; None where /proc does not tell, and then the loader decides."""
    try:
        return read_kind(OWN)
    except (OSError, InputError):
        return None


def warm_up() -> None:
    """Read a file as `check_library` reads one; its answer does not matter."""
    own_kind()
    with contextlib.suppress(OSError, InputError):
        read_kind(OWN, library=True)


def read_kind(path: str, library: bool = False) -> Kind:
    """Read the header, and of a `library` that its segments lie in the file. Raises OSError, InputError."""
    with open(path, "rb") as file:  # an entry may be below /proc/self/fd: no Path, no resolving
        head = file.read(HEAD)
        if len(head) < 52 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
            raise _unusable("an ELF file (a compiled shared library), got another kind of file")
        bits, order = 32 * head[4], "<" if head[5] == 1 else ">"
        what, machine = struct.unpack_from(order + "HH", head, 16)
        kind = Kind(bits, order, machine)
        if library:
            if what != SHARED:
                raise _unusable("a shared library (-shared), got another type of ELF file")
            if len(head) < (64 if bits == 64 else 52):
                raise _unusable("a whole file, got one that was cut")
            _check_whole(file.fileno(), kind, head)
    return kind


def _check_whole(fd: int, kind: Kind, head: bytes) -> None:
    """A segment beyond the end of the file would be a bus error in the loader: say what is wrong instead."""
    wide = kind.bits == 64
    (start,) = struct.unpack_from(kind.order + ("Q" if wide else "I"), head, 32 if wide else 28)
    size, count = struct.unpack_from(kind.order + "HH", head, 54 if wide else 42)
    length = os.fstat(fd).st_size
    if size < (56 if wide else 32) or not 0 < count <= MOST_SEGMENTS or start + size * count > length:
        raise _unusable("a whole file, got one whose table of segments is cut or wrong")
    table = os.pread(fd, size * count, start)
    for at in range(0, size * count, size):
        (what,) = struct.unpack_from(kind.order + "I", table, at)
        if wide:
            (offset,) = struct.unpack_from(kind.order + "Q", table, at + 8)
            (in_file,) = struct.unpack_from(kind.order + "Q", table, at + 32)
        else:
            (offset,) = struct.unpack_from(kind.order + "I", table, at + 4)
            (in_file,) = struct.unpack_from(kind.order + "I", table, at + 16)
        if what == LOAD and offset + in_file > length:
            raise _unusable("a whole file, got one whose segments go past its end")


def _unusable(what: str) -> InputError:
    return InputError("not-loadable", f"cannot load the module: expected {what}")
