"""Which slot runs: found from the mounted root, through device mapper and loop devices, and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from instar.host.boot.slots import Slot

MOUNTS, DEVICES = Path("/proc/self/mountinfo"), Path("/sys/dev/block")
LINE = Path("/proc/cmdline")
MARK = b"instar.via=kexec"
DEEPEST = 8  # device mapper on device mapper …


def running(slots: Iterable[Slot], mounts: Path = MOUNTS, devices: Path = DEVICES) -> str:
    """The name of the slot below `/`; '' when the root lies on none of them."""
    below = _below(_root(mounts), devices)
    for slot in slots:
        if _number(slot.device) in below or f"{_real(slot.device)} {slot.offset}" in below:
            return slot.name
    return ""


def booted_by(line: Path = LINE) -> str:
    """`kexec`, by the mark that our own kexec leaves on the command line, else `firmware`; '' when unreadable."""
    try:
        words = line.read_bytes().split()
    except OSError:
        return ""
    return "kexec" if MARK in words else "firmware"


def _root(mounts: Path) -> str:
    """`major:minor` of what is mounted last on `/`; '' when nothing can be read."""
    found = ""
    try:
        for line in mounts.read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) > 4 and words[4] == "/":
                found = words[2]
    except OSError:
        return ""
    return found


def _below(number: str, devices: Path) -> set[str]:
    """That device and all that it lies on: their numbers, and the files behind loop devices, each with the byte
    where it begins there, for one file may hold both slots."""
    found, todo = set(), [(number, 0)]
    while todo:
        at, depth = todo.pop()
        if not at or at in found or depth > DEEPEST:
            continue
        found.add(at)
        folder = devices / at
        backing = _text(folder / "loop/backing_file")
        if backing:
            found.add(f"{backing} {_text(folder / 'loop/offset') or 0}")
        try:
            lower = sorted(os.listdir(folder / "slaves"))
        except OSError:
            lower = []
        todo += [(_text(folder / "slaves" / name / "dev"), depth + 1) for name in lower]
    return found


def _number(device: Path) -> str:
    try:
        status = device.stat()
    except OSError:
        return ""
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if status.st_rdev else ""


def _real(device: Path) -> Path:
    return Path(os.path.realpath(device))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
