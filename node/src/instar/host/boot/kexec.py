"""Load a unified kernel image for kexec: its sections through memory files, as kexec_file_load(2) wants them.

Uses ctypes, so a one-shot child does it. An image may carry a placeholder for the slot's name in its command
line; one that carries none keeps its line untouched, and its initial file system finds the slot by itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from pathlib import Path

from instar.core.errors import InputError, MachineError
from instar.host.boot.running import MARK
from instar.trust import pe

CALLS = {"x86_64": 320, "aarch64": 294}  # number of kexec_file_load, by machine
UNLOAD = 1
LOADED = Path("/sys/kernel/kexec_loaded")
PLACEHOLDER = b"@SLOT@"
MOST_LINE, MOST_KERNEL, MOST_INITIAL = 4096, 256 << 20, 1 << 30


def command_line(raw: bytes, slot: str) -> bytes:
    """The kernel's command line for `slot`. Raises InputError `bad-command-line`."""
    line = raw.rstrip(b"\0\n ").replace(PLACEHOLDER, slot.encode()) + b" " + MARK
    if len(line) >= MOST_LINE or b"\0" in line or b"\n" in line:
        raise InputError("bad-command-line", "cannot use the command line: it is too long, or not one line")
    return line


def load(image: Path, slot: str) -> None:
    """Have the kernel hold `image` ready. Raises MachineError `kexec-refused` with the kernel's reason,
    InputError `bad-pe`."""
    try:
        with image.open("rb") as file:
            found = pe.sections(file)
            missing = [name for name in (".linux", ".initrd", ".cmdline") if name not in found]
            if missing:
                raise InputError("bad-pe", f"cannot read the kernel image: it has no {', '.join(missing)}")
            line = command_line(pe.read(file, found[".cmdline"], MOST_LINE), slot)
            kernel = _memory("kernel", pe.read(file, found[".linux"], MOST_KERNEL))
            initial = _memory("initial", pe.read(file, found[".initrd"], MOST_INITIAL))
    except OSError as error:
        raise MachineError("kexec-refused", f"cannot read {image}: {error.strerror}") from None
    try:
        _call(kernel, initial, line, 0)
    finally:
        os.close(kernel)
        os.close(initial)


def unload() -> None:
    """Forget what was loaded. Nothing loaded is fine."""
    _call(-1, -1, b"", UNLOAD)


def loaded() -> bool:
    try:
        return LOADED.read_text().strip() == "1"
    except OSError:
        return False


def _memory(name: str, data: bytes) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError:
        os.close(fd)
        raise
    return fd


def _call(kernel: int, initial: int, line: bytes, flags: int) -> None:
    number = CALLS.get(platform.machine())
    if number is None:
        raise MachineError("kexec-refused", f"cannot use kexec on {platform.machine()}")
    library = ctypes.CDLL(None, use_errno=True)
    length = len(line) + 1 if line else 0
    text = ctypes.c_char_p(line or None)
    flag = ctypes.c_ulong(flags)
    if library.syscall(ctypes.c_long(number), kernel, initial, ctypes.c_ulong(length), text, flag) != 0:
        code = ctypes.get_errno()
        raise MachineError("kexec-refused", f"cannot load the kernel for kexec: {_why(code)}")


def _why(code: int) -> str:
    known = {
        errno.EPERM: "not permitted (lockdown, or without CAP_SYS_BOOT)",
        errno.ENOKEY: "its signature is by no key of this machine",
        errno.ENOSYS: "this kernel has no kexec",
        errno.EKEYREJECTED: "its signature is refused",
    }
    return known.get(code, os.strerror(code))
