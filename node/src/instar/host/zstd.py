"""Zstandard frames: by Python's own module (from 3.14 on), the library libzstd, or the program zstd.

Nodes have nothing but the standard library, and Debian's dpkg and systemd bring the library with them.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
import tempfile
import threading
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
        return _Library(ctypes.CDLL(LIBRARY))
    except OSError:
        return None


class _Library:
    """libzstd by ctypes: about 2 MiB of memory for both, and one buffer of the longest frame's content.

    The context is kept from frame to frame: making one for each costs a quarter of the time. So one of these is
    for one thread.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        library.ZSTD_createDCtx.restype = pointer
        library.ZSTD_freeDCtx.argtypes = (pointer,)
        library.ZSTD_decompressDCtx.restype = size
        library.ZSTD_decompressDCtx.argtypes = (pointer, pointer, size, ctypes.c_char_p, size)
        library.ZSTD_isError.argtypes = (size,)
        library.ZSTD_getErrorName.argtypes = (size,)
        library.ZSTD_getErrorName.restype = ctypes.c_char_p
        self._library = library
        self._context = library.ZSTD_createDCtx()
        self._buffer = ctypes.create_string_buffer(0)
        if not self._context:
            raise MachineError("no-zstd", "cannot unpack: libzstd has no memory")

    def __call__(self, frame: bytes, most: int) -> bytes:
        library = self._library
        if len(self._buffer) < most:
            self._buffer = ctypes.create_string_buffer(most)
        count = library.ZSTD_decompressDCtx(self._context, self._buffer, most, frame, len(frame))
        if library.ZSTD_isError(count):
            raise _bad(library.ZSTD_getErrorName(count).decode(errors="replace"))
        return ctypes.string_at(self._buffer, count)

    def __del__(self) -> None:
        self._library.ZSTD_freeDCtx(self._context)


def _program() -> Decompress | None:
    path = shutil.which("zstd")
    if path is None:
        return None

    def decompress(frame: bytes, most: int) -> bytes:
        try:
            status, content, said = _run([path, "-dcq"], frame, most + 1)
        except OSError as error:
            raise MachineError("no-zstd", f"cannot unpack with {path}: {error}") from None
        _bounded(content, most)
        if status != 0:
            raise _bad(said.decode(errors="replace").strip()[-200:])
        return content

    return decompress


def _run(words: list[str], given: bytes, most: int) -> tuple[int, bytes, bytes]:
    """Status, output and errors of a program that reads `given`: of a longer output its first `most` bytes, and the
    program is ended then. Raises OSError, TimeoutError after PROGRAM_S."""
    with tempfile.TemporaryFile() as into, tempfile.TemporaryFile() as errors:
        into.write(given)
        into.seek(0)
        with subprocess.Popen(words, stdin=into, stdout=subprocess.PIPE, stderr=errors) as program:
            assert program.stdout is not None
            timer = threading.Timer(PROGRAM_S, program.kill)
            timer.start()
            try:
                content = program.stdout.read(most)
                if len(content) == most:
                    program.kill()
                status = program.wait()
                late = timer.finished.is_set()
            except BaseException:
                program.kill()
                raise
            finally:
                timer.cancel()
        if late:
            raise TimeoutError(f"it took longer than {PROGRAM_S:g} s")
        errors.seek(0)
        return status, content, errors.read(4096)


def _bounded(content: bytes, most: int) -> bytes:
    if len(content) > most:
        raise _bad(f"expected at most {most} bytes, got more")
    return content


def _bad(why: str) -> InputError:
    return InputError("bad-frame", f"cannot unpack a frame: {why}")
