"""Who listens: TCP sockets in the state LISTEN and UDP sockets that wait for anybody, with their processes.

The kernel's tables give address, port, owner and inode; the descriptors of all processes give who has that
inode open. Where those may not be looked at, the socket's control group tells which service it is, and the
programs are those of the group. A UDP socket in the range from which the kernel takes ports by itself is
somebody's question, not a service, and is left out.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import groups
from files import line, names, text

TABLES = (("tcp", "tcp", "0A"), ("tcp6", "tcp", "0A"), ("udp", "udp", "07"), ("udp6", "udp", "07"))
MOST = 2_000  # sockets
MOST_DESCRIPTORS = 200_000
MOST_TABLE = 32 << 20  # bytes


def look(root: str = "") -> dict[str, dict[str, Any]]:
    """'tcp 0.0.0.0:22' -> {"uid", "programs": [names], "known_by": "descriptor" | "group" | "", "group"}."""
    sockets = list(_listening(root))[:MOST]
    inodes = {inode for _, inode, _ in sockets}
    owners, owning = _owners(root, inodes), groups.of_sockets(root, inodes)
    found: dict[str, dict[str, Any]] = {}
    for place, inode, uid in sockets:
        group = owning.get(inode, "")
        one = found.setdefault(place, {"uid": uid, "programs": [], "known_by": "", "group": group})
        if inode in owners:
            one["programs"], one["known_by"] = sorted({*one["programs"], *owners[inode]}), "descriptor"
        elif group and not one["known_by"] and (programs := groups.programs(root, group)):
            one["programs"], one["known_by"] = programs, "group"
    return found


def lasting(seen: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What can be compared: the programs of a whole group come and go."""
    return {
        place: {
            name: value
            for name, value in one.items()
            if name != "programs" or one.get("known_by") == "descriptor"
        }
        for place, one in seen.items()
    }


def _listening(root: str) -> Iterator[tuple[str, int, int]]:
    low, high = _own_range(root)
    for table, protocol, state in TABLES:
        for row in text(f"{root}/proc/net/{table}", MOST_TABLE).splitlines()[1:]:
            fields = row.split()
            if len(fields) < 10 or fields[3] != state:
                continue
            address, _, digits = fields[1].rpartition(":")
            port = int(digits, 16)
            if not port or (protocol == "udp" and low <= port <= high):
                continue
            yield f"{protocol} {_address(address)}:{port}", int(fields[9]), int(fields[7])


def _own_range(root: str) -> tuple[int, int]:
    words = line(f"{root}/proc/sys/net/ipv4/ip_local_port_range").split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else (32_768, 60_999)


def _address(digits: str) -> str:
    """The kernel prints each 32 bits as the machine holds them."""
    words = [int(digits[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(digits), 8)]
    raw = b"".join(words)
    if len(raw) == 4:
        return socket.inet_ntop(socket.AF_INET, raw)
    return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]"


def _owners(root: str, wanted: set[int]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    left = MOST_DESCRIPTORS
    for pid in names(f"{root}/proc"):
        if not pid.isdecimal() or left <= 0:
            continue
        folder = f"{root}/proc/{pid}/fd"
        for number in names(folder):
            left -= 1
            try:
                target = os.readlink(f"{folder}/{number}")
            except OSError:
                continue
            if target.startswith("socket:[") and int(target[8:-1]) in wanted:
                found.setdefault(int(target[8:-1]), set()).add(line(f"{root}/proc/{pid}/comm"))
    return found
