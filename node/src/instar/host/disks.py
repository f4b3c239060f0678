"""Whether a folder can take a release: free space with a reserve for the way back, and mount flags."""

from __future__ import annotations

import os
from pathlib import Path

from instar.core.errors import MachineError

RESERVE_BYTES = 8 * 1024 * 1024  # kept free, so that journal and way back never meet a full disk


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the file system of `folder`."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def check_space(folder: Path, need: int) -> None:
    """Raises MachineError `no-space` unless `need` bytes and the reserve are free."""
    free = free_bytes(folder)
    if free < need + RESERVE_BYTES:
        text = (
            f"cannot stage in {folder}: expected {need + RESERVE_BYTES} bytes free "
            f"({need} and a reserve for the way back), got {free}"
        )
        raise MachineError("no-space", text)


def check_flags(folder: Path) -> None:
    """Raises MachineError `mounted-noexec` or `mounted-read-only`, naming the folder.

    noexec alone would not stop `python3 file`, but it stops modules and says that the operator
    of the machine meant no programs to live there.
    """
    flags = os.statvfs(folder).f_flag
    if flags & os.ST_RDONLY:
        raise MachineError("mounted-read-only", f"cannot stage in {folder}: its file system is read-only")
    if flags & os.ST_NOEXEC:
        text = f"cannot stage in {folder}: its file system is mounted noexec; choose another --state"
        raise MachineError("mounted-noexec", text)
