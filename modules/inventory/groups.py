"""Which control group (cgroup v2) a socket belongs to: under systemd, which service.

A module that is held to its folders by Landlock may not look at the descriptors of other processes, whoever it
runs as. What sock_diag(7) tells about sockets, and which processes a group has, anybody may read.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator

from files import line, text

SOCK_DIAG, BY_FAMILY = 4, 20  # netlink family; message type
REQUEST_DUMP = 0x301
ERROR, DONE = 2, 3
CGROUP = 21  # attribute INET_DIAG_CGROUP_ID, since Linux 5.7
HEADER = struct.Struct("=IHHII")
BODY = 72  # struct inet_diag_msg
INODE = 68  # in it
STATES = {socket.IPPROTO_TCP: 1 << 10, socket.IPPROTO_UDP: 1 << 7}  # LISTEN; not connected
ANSWER_S = 5.0
MOST_GROUPS = 10_000
MOST_PROGRAMS = 8  # a group with more tells nothing about one socket


def of_sockets(root: str, wanted: set[int]) -> dict[int, str]:
    """Inode -> the group's path, such as '/system.slice/ssh.service'. {} where the kernel does not tell."""
    try:
        ids = {inode: group for inode, group in _sockets() if inode in wanted}
    except (OSError, struct.error):
        return {}
    paths = _paths(root, set(ids.values())) if ids else {}
    return {inode: paths[group] for inode, group in ids.items() if group in paths}


def programs(root: str, group: str) -> list[str]:
    """The names of a group's processes; [] when they are too many to tell anything."""
    pids = text(f"{_mount(root)}{group}/cgroup.procs").split()
    found = {line(f"{root}/proc/{pid}/comm") for pid in pids[:200]} - {""}
    return sorted(found) if len(found) <= MOST_PROGRAMS and len(pids) <= 200 else []


def _sockets() -> Iterator[tuple[int, int]]:
    """(inode, id of its group) of every socket that waits."""
    for family in (socket.AF_INET, socket.AF_INET6):
        for protocol, states in STATES.items():
            yield from _dump(struct.pack("=BBBxI48x", family, protocol, 0, states))


def _dump(body: bytes) -> Iterator[tuple[int, int]]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, SOCK_DIAG) as asked:
        asked.settimeout(ANSWER_S)
        asked.bind((0, 0))
        asked.send(HEADER.pack(HEADER.size + len(body), BY_FAMILY, REQUEST_DUMP, 1, 0) + body)
        while True:
            data = asked.recv(1 << 18)
            at = 0
            while at + HEADER.size <= len(data):
                length, kind, _, _, _ = HEADER.unpack_from(data, at)
                if kind in (DONE, ERROR) or not HEADER.size <= length <= len(data) - at:
                    return
                message = data[at + HEADER.size : at + length]
                if len(message) >= BODY and (group := _attribute(message, CGROUP)):
                    yield struct.unpack_from("=I", message, INODE)[0], int.from_bytes(group, sys.byteorder)
                at += (length + 3) & ~3
            if not data:
                return


def _attribute(message: bytes, wanted: int) -> bytes:
    at = BODY
    while at + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, at)
        if length < 4:
            return b""
        if kind & 0x3FFF == wanted:
            return message[at + 4 : at + length]
        at += (length + 3) & ~3
    return b""


def _mount(root: str) -> str:
    """Where the one hierarchy of version 2 is mounted; '' when it is not."""
    for row in text(f"{root}/proc/self/mountinfo", 4 << 20).splitlines():
        before, _, after = row.partition(" - ")
        if after.startswith("cgroup2 "):
            return root + before.split(" ")[4]
    return ""


def _paths(root: str, wanted: set[int]) -> dict[int, str]:
    """Of the groups with these ids, which are the inodes of their folders; the first group of all is no answer."""
    mount = _mount(root)
    found: dict[int, str] = {}
    stack, left = ([mount] if mount else []), MOST_GROUPS
    while stack and left and len(found) < len(wanted):
        folder = stack.pop()
        try:
            with os.scandir(folder) as entries:
                inner = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        for entry in inner:
            left = max(0, left - 1)
            stack.append(entry.path)
            if entry.inode() in wanted:
                found[entry.inode()] = entry.path.removeprefix(mount)
    return found
