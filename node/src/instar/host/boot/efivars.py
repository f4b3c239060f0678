"""EFI variables through efivarfs: read, written only on change, read back, and never left half there.

A file `<name>-<vendor guid>` holds four bytes of attributes and the value (kernel documentation,
filesystems/efivarfs). Facts that bite: a write must be one call; most files are immutable (chattr +i) until
the flag is taken off; a full store says ENOSPC, and may then keep an empty file that nobody can read.
The folder is an argument, so that a plain one serves in tests.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
from pathlib import Path

from instar.core.errors import MachineError
from instar.host.files import DISK, Disk
from instar.host.points import reach

FOLDER = Path("/sys/firmware/efi/efivars")
GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"  # EFI_GLOBAL_VARIABLE
ATTRIBUTES = struct.pack("<I", 7)  # non-volatile, boot service and run-time access
GET_FLAGS, SET_FLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10  # linux/fs.h, 64 bits
OVERHEAD = 64  # bytes that a store needs beside name and value, at the most
BOOT = re.compile(r"Boot([0-9A-F]{4})")


class Variables:
    """The variables of one vendor in `folder`. Raises MachineError."""

    def __init__(self, folder: Path = FOLDER, vendor: str = GLOBAL, disk: Disk = DISK) -> None:
        self.folder, self.vendor, self._disk = folder, vendor, disk

    @property
    def present(self) -> bool:
        """Whether this machine was started by EFI, and its variables can be seen."""
        return self.folder.is_dir() and any(self.folder.iterdir())

    def names(self) -> list[str]:
        """Names without the vendor's GUID."""
        try:
            found = os.listdir(self.folder)
        except OSError as error:
            raise MachineError("no-variables", f"cannot read EFI variables: {error}") from None
        end = f"-{self.vendor}"
        return sorted(name.removesuffix(end) for name in found if name.endswith(end))

    def entries(self) -> list[int]:
        """The numbers of all Boot#### variables."""
        return [int(match[1], 16) for name in self.names() if (match := BOOT.fullmatch(name))]

    def read(self, name: str) -> bytes | None:
        """The value without its attributes; None where there is none, or an empty one that a failure left."""
        try:
            data = self._path(name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MachineError("no-variables", f"cannot read EFI variable {name}: {error.strerror}") from None
        return data[4:] if len(data) > 4 else None

    def write(self, name: str, value: bytes) -> bool:
        """Give `name` a value; False when it had it. Raises MachineError `variables-full`, `variables-read-only`,
        `variable-not-kept` when the firmware says one thing and does another."""
        if self.read(name) == value:
            return False
        self._check_room(name, value)
        reach("efivars:write")
        self._unlocked(name)
        try:
            self._disk.write_variable(self._path(name), ATTRIBUTES + value)
        except OSError as error:
            self._swept(name)
            raise _failed("write", name, error) from None
        if self.read(name) != value:
            text = f"cannot write EFI variable {name}: the firmware took it, and keeps another value"
            raise MachineError("variable-not-kept", text)
        return True

    def delete(self, name: str) -> None:
        """Absent is fine."""
        self._unlocked(name)
        try:
            self._disk.unlink(self._path(name))
        except FileNotFoundError:
            return
        except OSError as error:
            raise _failed("delete", name, error) from None

    def room(self) -> int | None:
        """Free bytes in the store, where the kernel tells; None where not."""
        try:
            found = os.statvfs(self.folder)
        except OSError:
            return None
        return found.f_bavail * found.f_frsize if found.f_blocks else None

    def _check_room(self, name: str, value: bytes) -> None:
        """A store is looked at before it is written: one that is full may keep the half of it."""
        needed, room = 2 * len(name) + len(value) + OVERHEAD, self.room()
        if room is not None and room < needed:
            raise _failed("write", name, OSError(errno.ENOSPC, f"{room} bytes are free"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}-{self.vendor}"

    def _unlocked(self, name: str) -> None:
        """Take the immutable flag off, where the file system has one."""
        with contextlib.suppress(OSError):
            fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                (flags,) = struct.unpack("<l", fcntl.ioctl(fd, GET_FLAGS, struct.pack("<l", 0)))
                if flags & IMMUTABLE:
                    fcntl.ioctl(fd, SET_FLAGS, struct.pack("<l", flags & ~IMMUTABLE))
            finally:
                os.close(fd)

    def _swept(self, name: str) -> None:
        """Remove the empty variable that a failed write can leave."""
        with contextlib.suppress(OSError):
            if self._path(name).stat().st_size <= 4:
                self._unlocked(name)
                self._disk.unlink(self._path(name))


def _failed(doing: str, name: str, error: OSError) -> MachineError:
    code, why = "variables-read-only", error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        code, why = "variables-full", "the firmware's store is full; delete entries that nobody needs"
    return MachineError(code, f"cannot {doing} EFI variable {name}: {why}")
