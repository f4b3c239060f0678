"""Who listens: TCP sockets in the state LISTEN and UDP sockets that wait for anybody, with their processes.

The kernel's tables give address, port, owner and inode; the descriptors of all processes give who has that
inode open. A UDP socket in the range from which the kernel takes ports by itself is somebody's question, not
a service, and is left out.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from files import line, names, text

TABLES = (("tcp", "tcp", "0A"), ("tcp6", "tcp", "0A"), ("udp", "udp", "07"), ("udp6", "udp", "07"))
MOST = 2_000  # sockets
MOST_DESCRIPTORS = 200_000
MOST_TABLE = 32 << 20  # bytes


def look(root: str = "") -> dict[str, dict[str, Any]]:
    """'tcp 0.0.0.0:22' -> {"uid", "programs": {name: how many processes}}. Programs need the right to look."""
    sockets = list(_listening(root))[:MOST]
    owners = _owners(root, {inode for _, inode, _ in sockets})
    found: dict[str, dict[str, Any]] = {}
    for place, inode, uid in sockets:
        one = found.setdefault(place, {"uid": uid, "programs": []})
        one["programs"] = sorted({*one["programs"], *owners.get(inode, set())})
    return found


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
