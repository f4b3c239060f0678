"""Zstandard frames: by Python's own module (from 3.14 on), the library libzstd, or the program zstd.

Nodes have nothing but the standard library, and Debian's dpkg and systemd bring the library with them.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
from collections.abc import Callable

from instar.core.errors import InputError, MachineError

LIBRARY = "libzstd.so.1"
PROGRAM_S = 60.0

Decompress = Callable[[bytes, int], bytes]
"""A frame and the most that it may give -> its content. Raises InputError `bad-frame`."""


def decompressor() -> Decompress:
    """The best that there is. Raises MachineError `no-zstd`."""
    for find in (_python, _library, _program):
        found = find()
        if found is not None:
            return found
    raise MachineError(
        "no-zstd", "cannot unpack: expected the library libzstd, or the program zstd; install one of them"
    )


def _python() -> Decompress | None:
    try:
        module = importlib.import_module("compression.zstd")
    except ImportError:
        return None

    def decompress(frame: bytes, most: int) -> bytes:
        try:
            content = bytes(module.ZstdDecompressor().decompress(frame, most + 1))
        except module.ZstdError as error:
            raise _bad(str(error)) from None
        return _bounded(content, most)

    return decompress


def _library() -> Decompress | None:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    call = library.ZSTD_decompress
    call.restype = ctypes.c_size_t
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
    library.ZSTD_isError.argtypes = (ctypes.c_size_t,)
    library.ZSTD_getErrorName.argtypes = (ctypes.c_size_t,)
    library.ZSTD_getErrorName.restype = ctypes.c_char_p

    def decompress(frame: bytes, most: int) -> bytes:
        buffer = ctypes.create_string_buffer(most)
        count = call(buffer, most, frame, len(frame))
        if library.ZSTD_isError(count):
            raise _bad(library.ZSTD_getErrorName(count).decode(errors="replace"))
        return buffer.raw[:count]

    return decompress


def _program() -> Decompress | None:
    path = shutil.which("zstd")
    if path is None:
        return None

    def decompress(frame: bytes, most: int) -> bytes:
        try:
            done = subprocess.run(
                [path, "-dcq"], input=frame, capture_output=True, timeout=PROGRAM_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MachineError("no-zstd", f"cannot unpack with {path}: {error}") from None
        if done.returncode != 0:
            raise _bad(done.stderr.decode(errors="replace").strip()[-200:])
        return _bounded(done.stdout, most)

    return decompress


def _bounded(content: bytes, most: int) -> bytes:
    if len(content) > most:
        raise _bad(f"expected at most {most} bytes, got more")
    return content


def _bad(why: str) -> InputError:
    return InputError("bad-frame", f"cannot unpack a frame: {why}")
