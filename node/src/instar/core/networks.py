"""Which peers may wake this node: networks as an operator writes them. Pure.

Import diet: this is in the resident agent, so `ipaddress` (it would cost 0.5 MiB) is done without.

>>> is_in("10.1.2.3", [network("10.0.0.0/8")]), is_in("::ffff:8.8.8.8", [network("10.0.0.0/8")])
(True, False)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from instar.core.errors import InputError
from instar.core.light import dataclass

PRIVATE = (  # RFC 1918, loopback, link-local, RFC 4193
    "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16",
    "::1/128", "fc00::/7", "fe80::/10",
)  # fmt: skip
MAPPED = bytes(10) + b"\xff\xff"  # before an IPv4 address in an IPv6 one, RFC 4291 2.5.5.2


@dataclass(frozen=True, slots=True)
class WakeSettings:
    """The wake-up port (docs/configuration.md): TCP port, 0 for none; who may use it; least seconds between
    two times that it makes the node phone home."""

    port: int = 7611
    trusted: tuple[str, ...] = PRIVATE
    every_s: float = 1.0


class Network(NamedTuple):
    """`address` has 4 or 16 bytes; the first `bits` bits of it count."""

    address: bytes
    bits: int

    def holds(self, address: bytes) -> bool:
        if len(address) != len(self.address):
            return False
        drop = len(address) * 8 - self.bits
        return int.from_bytes(address) >> drop == int.from_bytes(self.address) >> drop


def network(text: str) -> Network:
    """`10.0.0.0/8`, `fd00::/8`, or one address. Raises InputError `bad-network`."""
    base, slash, length = text.partition("/")
    address = address_bytes(base)
    most = len(address or b"") * 8
    bits = int(length) if length.isascii() and length.isdecimal() and len(length) <= 3 else most + 1
    found = Network(address or b"", bits if slash else most)
    if address is None or found.bits > most:
        expected = "an address, or a network such as 10.0.0.0/8 or fd00::/8"
        raise InputError("bad-network", f"cannot use network: expected {expected}, got {text!a:.60}")
    if int.from_bytes(address) & ((1 << (most - found.bits)) - 1):
        expected = f"no bits of {base} past the first {found.bits}"
        raise InputError("bad-network", f"cannot use network: expected {expected}, got {text!a:.60}")
    return found


def is_in(peer: str, networks: Iterable[Network]) -> bool:
    """Whether the address of a peer, as the kernel shows it, is in one of `networks`."""
    address = address_bytes(peer.partition("%")[0])
    if address is None:
        return False
    if address.startswith(MAPPED) and len(address) == 16:  # how an IPv6 socket shows an IPv4 peer
        address = address[len(MAPPED) :]
    return any(each.holds(address) for each in networks)


def address_bytes(text: str) -> bytes | None:
    """The 4 or 16 bytes of an address in text; None for anything else."""
    return _six(text) if ":" in text else _four(text)


def _four(text: str) -> bytes | None:
    parts = text.split(".")
    fits = len(parts) == 4 and all(
        part.isascii() and part.isdecimal() and len(part) <= 3 and int(part) < 256 and str(int(part)) == part
        for part in parts
    )
    return bytes(map(int, parts)) if fits else None


def _six(text: str) -> bytes | None:
    """RFC 4291 2.2: eight groups, `::` once for a row of zeros, an IPv4 address for the last two groups."""
    head, gap, tail = text.partition("::")
    left, right = _groups(head), _groups(tail)
    if left is None or right is None or "::" in tail or (gap and "." in head):
        return None
    missing = 16 - len(left) - len(right)
    if missing < 2 if gap else missing:
        return None
    return left + bytes(missing) + right


def _groups(text: str) -> bytes | None:
    found = b""
    words = text.split(":") if text else []
    for number, word in enumerate(words):
        if "." in word:
            four = _four(word)
            if four is None or number != len(words) - 1:
                return None
            found += four
        elif 1 <= len(word) <= 4 and all(digit in "0123456789abcdefABCDEF" for digit in word):
            found += int(word, 16).to_bytes(2)
        else:
            return None
    return found if len(found) <= 16 else None
