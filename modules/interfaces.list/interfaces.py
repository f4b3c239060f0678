"""interfaces.list: the machine's network interfaces and their addresses, as the kernel tells them (rtnetlink).

    args   {"name": "eth0", "all": false}
    reply  {"interfaces": [{"name", "index", "kind", "mac", "mtu", "up", "state", "speed_mbit", "master",
            "addresses": [{"address", "prefix", "scope", "peer"}], "rx_bytes", "tx_bytes", …}],
            "left_out": 0, "cut": 0}

Without `all`, loopback and interfaces that are switched off are left out, and counted. `speed_mbit` is null
where there is none (bridges, tunnels, no cable). `cut` counts what did not fit in one reply.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_REPLY = 200_000  # bytes of JSON; a reply has room for some more
MOST_ADDRESSES = 64  # of one interface
ANSWER_S = 5.0
TRIES = 3  # the kernel says when the list changed under it

GETLINK, GETADDR = 18, 22
NEWLINK, NEWADDR = 16, 20
ERROR, DONE = 2, 3
REQUEST, DUMP, DUMP_INTERRUPTED = 0x1, 0x300, 0x10
UP, LOOPBACK = 0x1, 0x8
HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
LINK = struct.Struct("=BxHiII")  # family, type, index, flags, change
ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
STATES = ("unknown", "not-present", "down", "lower-layer-down", "testing", "dormant", "up")
SCOPES = {0: "global", 200: "site", 253: "link", 254: "host", 255: "nowhere"}
COUNTERS = (
    "rx_packets", "tx_packets", "rx_bytes", "tx_bytes", "rx_errors", "tx_errors", "rx_dropped", "tx_dropped",
)  # fmt: skip


class Interrupted(Exception):
    """The kernel's list changed while it was read."""


def run(args: dict[str, Any], context: Any) -> dict[str, Any]:
    """Raises ValueError for arguments that cannot be used, OSError when the kernel does not answer."""
    name, everything = _arguments(args)
    found = sorted(_interfaces(), key=lambda one: one["index"])
    if name is not None:
        shown = [one for one in found if one["name"] == name]
        if not shown:
            known = ", ".join(one["name"] for one in found[:20])
            raise ValueError(f"cannot show interface: expected one of {known}, got {name!a}")
    else:
        shown = [one for one in found if everything or (one["up"] and one["kind"] != "loopback")]
    left_out = 0 if name is not None else len(found) - len(shown)
    fitting = _fit(shown)
    return {"interfaces": fitting, "left_out": left_out, "cut": len(shown) - len(fitting)}


def _arguments(args: dict[str, Any]) -> tuple[str | None, bool]:
    if unknown := sorted(set(args) - {"name", "all"}):
        raise ValueError(f"cannot list interfaces: expected 'name' or 'all', got {unknown[0]!a:.80}")
    name, everything = args.get("name"), args.get("all", False)
    if name is not None and (not isinstance(name, str) or not name or len(name) > 255):
        raise ValueError(f"cannot list interfaces: expected a text as 'name', got {name!a:.80}")
    if not isinstance(everything, bool):
        raise ValueError(f"cannot list interfaces: expected true or false as 'all', got {everything!a:.80}")
    return name, everything


def _fit(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many from the front as one reply holds."""
    room = MOST_REPLY
    for number, item in enumerate(items):
        room -= len(json.dumps(item)) + 2
        if room < 0:
            return items[:number]
    return items


def _interfaces() -> list[dict[str, Any]]:
    for _ in range(TRIES):
        try:
            links = {link["index"]: link for link in _links()}
            _add_addresses(links)
        except Interrupted:
            continue
        for link in links.values():
            master = links.get(link.pop("_master"))
            link["master"] = master["name"] if master else None
        return list(links.values())
    raise OSError("cannot list interfaces: the kernel's list did not stand still")


def _links() -> Iterator[dict[str, Any]]:
    for body in _dump(GETLINK, NEWLINK, LINK.pack(0, 0, 0, 0, 0)):
        _, hardware, index, flags, _ = LINK.unpack_from(body)
        attributes = dict(_attributes(body, LINK.size))
        name = _text(attributes.get(3, b""))
        state = attributes.get(16, b"\0")[0]
        counted = struct.unpack_from("=8Q", attributes.get(23, b"").ljust(64, b"\0"))
        yield {
            "name": name,
            "index": index,
            "kind": "loopback" if flags & LOOPBACK else _kind(attributes.get(18, b""), hardware),
            "mac": attributes[1].hex(":") if any(attributes.get(1, b"")) else None,
            "mtu": struct.unpack("=I", attributes.get(4, bytes(4)))[0],
            "up": bool(flags & UP),
            "state": STATES[state] if state < len(STATES) else str(state),
            "speed_mbit": _speed(name),
            "addresses": [],
            **dict(zip(COUNTERS, counted, strict=True)),
            "_master": struct.unpack("=I", attributes.get(10, bytes(4)))[0],
        }


def _kind(info: bytes, hardware: int) -> str:
    """What made it (bridge, vlan, wireguard, …), else what the hardware is."""
    made = dict(_attributes(info, 0)).get(1, b"")
    return _text(made) or {1: "ethernet", 32: "infiniband", 512: "ppp"}.get(hardware, "other")


def _speed(name: str) -> int | None:
    """Megabits a second; the file says -1, or cannot be read, where there is none."""
    if not name or "/" in name or name in (".", ".."):
        return None
    try:
        speed = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return None
    return speed if 0 < speed < 0xFFFFFFFF else None


def _add_addresses(links: dict[int, dict[str, Any]]) -> None:
    for body in _dump(GETADDR, NEWADDR, ADDRESS.pack(0, 0, 0, 0, 0)):
        family, prefix, _, scope, index = ADDRESS.unpack_from(body)
        attributes = dict(_attributes(body, ADDRESS.size))
        link = links.get(index)
        raw = attributes.get(2) or attributes.get(1)  # local; address is the peer's where both are there
        if link is None or raw is None or family not in (socket.AF_INET, socket.AF_INET6):
            continue
        if len(link["addresses"]) >= MOST_ADDRESSES:
            link["more_addresses"] = link.get("more_addresses", 0) + 1
            continue
        found = {
            "address": socket.inet_ntop(family, raw),
            "prefix": prefix,
            "scope": SCOPES.get(scope, str(scope)),
        }
        if (peer := attributes.get(1)) and peer != raw:
            found["peer"] = socket.inet_ntop(family, peer)
        link["addresses"].append(found)


def _dump(request: int, answer: int, body: bytes) -> Iterator[bytes]:
    """The bodies of all messages of the kind `answer`. Raises Interrupted, OSError."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as line:
        line.settimeout(ANSWER_S)
        line.bind((0, 0))
        line.send(HEADER.pack(HEADER.size + len(body), request, REQUEST | DUMP, 1, 0) + body)
        while True:
            data, _, flags, sender = line.recvmsg(1 << 18)
            if sender[0] != 0:
                continue  # another process may write to us; only the kernel counts
            if flags & socket.MSG_TRUNC:
                raise OSError("cannot list interfaces: the kernel's message was cut")
            for kind, content in _messages(data):
                if kind == DONE:
                    return
                if kind == ERROR:
                    number = -struct.unpack_from("=i", content.ljust(4, b"\0"))[0]
                    raise OSError(number, f"cannot list interfaces: {os.strerror(number)}")
                if kind == answer:
                    yield content


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + HEADER.size <= len(data):
        length, kind, flags, _, _ = HEADER.unpack_from(data, at)
        if not HEADER.size <= length <= len(data) - at:
            raise OSError("cannot list interfaces: the kernel's message makes no sense")
        if flags & DUMP_INTERRUPTED:
            raise Interrupted
        yield kind, data[at + HEADER.size : at + length]
        at += (length + 3) & ~3


def _attributes(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if not 4 <= length <= len(data) - at:
            return
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "backslashreplace")
