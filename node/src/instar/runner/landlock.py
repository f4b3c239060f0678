"""Landlock: from here on this process, and all that it starts, can write only below the folders that it names.

The kernel's own sandbox for processes without rights (5.13 and later). Once in force it cannot be taken
back. Reading stays as it is; so does what was opened before. See landlock(7).

  version 1  writing, making and removing of files
          2  moving files between folders
          3  truncating
          4  TCP: bind and connect
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable

from instar.core.errors import MachineError

CREATE, ADD_RULE, RESTRICT = 444, 445, 446  # the same numbers on every architecture but alpha
VERSION = 1  # flag of CREATE
BENEATH = 1  # rule type: below a path
NO_NEW_PRIVS = 38  # prctl

WRITE_FILE, REMOVE_DIR, REMOVE_FILE = 1 << 1, 1 << 4, 1 << 5
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << bit for bit in range(6, 13))
REFER, TRUNCATE = 1 << 13, 1 << 14
DEVICES = MAKE_CHAR | MAKE_BLOCK  # never granted
BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1
OF_FILES = WRITE_FILE | TRUNCATE  # what can be granted for a path that is no folder
FIRST = (
    WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM | DEVICES
)
NONE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)  # not built in, not enabled, kept from us by a container


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype, _syscall.argtypes = ctypes.c_long, [ctypes.c_long] * 5


def version() -> int:
    """The kernel's version of the interface; 0: it has none."""
    found = _syscall(CREATE, 0, 0, VERSION, 0)
    return max(0, int(found))


def restrict_writes(paths: Iterable[str], network: bool = True) -> bool:
    """Forbid writing except to or below `paths`, for good; False: this kernel cannot, nothing was changed.

    A path that does not exist grants nothing. Without `network`, TCP is forbidden too where the kernel can
    (version 4). Sets no_new_privs, which the kernel asks for. Raises MachineError `no-landlock` when the
    kernel has it and refuses: nothing must run then in the belief that it is held.
    """
    known = version()
    if not known:
        return False
    handled = FIRST | (REFER if known >= 2 else 0) | (TRUNCATE if known >= 3 else 0)
    closed = known >= 4 and not network
    rules = _Ruleset(handled, BIND_TCP | CONNECT_TCP if closed else 0)
    size = ctypes.sizeof(_Ruleset) if known >= 4 else 8  # older kernels know the first member only
    ruleset = _syscall(CREATE, ctypes.addressof(rules), size, 0, 0)
    if ruleset < 0:
        if ctypes.get_errno() in NONE:
            return False
        raise _refused("make a set of rules")
    try:
        for path in paths:
            _allow(ruleset, path, handled & ~DEVICES)
        if _libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) or _syscall(RESTRICT, ruleset, 0, 0, 0):
            raise _refused("be put in force")
    finally:
        os.close(ruleset)
    return True


def warm_up() -> None:
    """Make a set of rules, and leave it at that."""
    if version():
        rules = _Ruleset(FIRST, 0)
        ruleset = _syscall(CREATE, ctypes.addressof(rules), 8, 0, 0)
        if ruleset >= 0:
            try:
                _allow(ruleset, "/dev/null", FIRST & ~DEVICES)
            finally:
                os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # grants nothing, which is the safe side
    try:
        if not stat.S_ISDIR(os.fstat(folder).st_mode):
            rights &= OF_FILES
        rule = _Beneath(rights, folder)
        if _syscall(ADD_RULE, ruleset, BENEATH, ctypes.addressof(rule), 0):
            raise _refused(f"allow {path}")
    finally:
        os.close(folder)


def _refused(what: str) -> MachineError:
    number = ctypes.get_errno()
    text = f"cannot hold the module to its folders: expected the kernel's Landlock to {what}, got"
    return MachineError("no-landlock", f"{text} {os.strerror(number)}")
