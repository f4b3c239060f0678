"""A parcel as it comes in blocks: onto the disk, gone on with after a cut, checked at its end.

Calls wait for nothing but the disk. Its whereabouts and its record are those of host/incoming.py.
Import diet: as there.
"""

from __future__ import annotations

import binascii
import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from instar.core.errors import InputError, InstarError, MachineError, TrustError
from instar.host.files import failed
from instar.host.parcel import CHUNK, Parcel
from instar.host.points import reach
from instar.wire.messages import BLOCK_BOUNDS, WINDOW_BOUNDS, UpdateOffer

if TYPE_CHECKING:
    from instar.host.incoming import Incoming

RECOVERY = "recovery"  # the line of recovery cores
MOST_ID = 200  # characters of an offer's id
SYNC_EVERY = 4 << 20  # bytes
LEAST_RATE = 1_024  # bytes a second: a lower cap could not move a block in time
PACE_S = 10.0  # a window lasts no longer than this, whatever the cap


class Terms(NamedTuple):
    """How blocks come: bytes of one, how many may be under way, bytes a second (0: no cap)."""

    block: int
    window: int
    rate_bytes_s: int


def agree(offer: UpdateOffer, block: int, window: int, rate_bytes_s: int) -> Terms:
    """The smaller of both sides' figures; smaller still where a window would last long under the cap.

    Raises InputError `bad-offer` for figures outside the protocol's bounds.
    """
    for name, value, bounds in (
        ("block", offer.block, BLOCK_BOUNDS),
        ("window", offer.window, WINDOW_BOUNDS),
    ):
        if value < bounds[0]:
            raise bad_offer(f"a {name} of at least {bounds[0]}", f"{value}")
    if offer.rate_bytes_s < 0:
        raise bad_offer("a rate of 0 or more", f"{offer.rate_bytes_s}")
    block = min(offer.block, max(block, BLOCK_BOUNDS[0]), BLOCK_BOUNDS[1])
    window = min(offer.window, max(window, WINDOW_BOUNDS[0]), WINDOW_BOUNDS[1])
    caps = [max(cap, LEAST_RATE) for cap in (offer.rate_bytes_s, rate_bytes_s) if cap]
    if not caps:
        return Terms(block, window, 0)
    most = round(min(caps) * PACE_S)
    block = max(BLOCK_BOUNDS[0], min(block, most))
    return Terms(block, max(1, min(window, most // block)), min(caps))


def decode_block(data: str) -> bytes:
    """The bytes of an `update-block`. Raises InputError `bad-encoding`."""
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except ValueError as error:  # also for characters outside ASCII
        raise InputError("bad-encoding", f"cannot use block: expected base64: {error}") from None


class Receiving:
    """One parcel that is coming. Not safe for two threads at once. After an error nothing of it is left."""

    def __init__(
        self, incoming: Incoming, offer: UpdateOffer, block: int, have: int, whole: Parcel | None
    ) -> None:
        self.offer, self.block_size = offer, block
        self.total = -(-offer.length // block)
        self._incoming, self._whole = incoming, whole
        self._size = offer.length if whole else have if have == offer.length else have // block * block
        self._synced = self._size
        self._fd = -1

    @property
    def blocks(self) -> int:
        """How many have come, in a row from the first."""
        return self.total if self._size == self.offer.length else self._size // self.block_size

    def block(self, n: int, data: bytes) -> int:
        """Write block `n`; how many there are then. They are synced every SYNC_EVERY bytes.

        Raises InputError (`wrong-block`, `wrong-block-size`) or MachineError (`disk-full`, `disk-failed`).
        """
        if n != self.blocks or n >= self.total:
            raise self._fail("wrong-block", f"block {self.blocks} of {self.total}", f"block {n}")
        expected = min(self.block_size, self.offer.length - self._size)
        if len(data) != expected:
            raise self._fail("wrong-block-size", f"{expected} bytes in block {n}", f"{len(data)}")
        try:
            if self._fd < 0:
                self._begin()
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            self._size += len(data)
            if self._size - self._synced >= SYNC_EVERY:
                self._sync()
        except OSError as error:
            self.discard()
            raise failed("write", self._path, error) from error
        except MachineError:
            self.discard()
            raise
        reach("incoming:block")
        return self.blocks

    def end(self, sha384: str) -> Parcel:
        """Check the whole as it lies on the disk, and unpack it. Idempotent.

        Raises InputError `incomplete-parcel`, TrustError (`altered-parcel`, `bad-parcel`, `cut-parcel`,
        `wrong-parcel`) or MachineError.
        """
        try:
            if self._size != self.offer.length:
                raise self._fail("incomplete-parcel", f"{self.total} blocks", f"{self.blocks}")
            if sha384 != self.offer.sha384:
                text = "cannot use the parcel: its end names another SHA-384 than its offer"
                raise TrustError("altered-parcel", text)
            parcel = self._whole or self._unpack()
            self._check(parcel)
            self._incoming.drop_part(sha384)
        except InstarError:
            self.discard()
            raise
        finally:
            self.close()
        return parcel

    def discard(self) -> None:
        """Leave nothing of it. What was whole before stays."""
        self.close()
        self._size = self._synced = self.offer.length if self._whole else 0
        with contextlib.suppress(MachineError):
            self._incoming.drop_part(self.offer.sha384)

    def close(self) -> None:
        """Let go; the part stays for the next try. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def _path(self) -> Path:
        return self._incoming.part(self.offer.sha384)

    def _begin(self) -> None:
        """The record first: bytes that nobody can tell the meaning of are of no use."""
        self._incoming.make_room(self.offer.sha384, "channel")
        if not self._size:
            self._incoming.note(self.offer, 0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, 0o600)
        os.ftruncate(self._fd, self._size)
        os.lseek(self._fd, self._size, os.SEEK_SET)
        if self._size:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._fd)
        self._synced = self._size
        self._incoming.note(self.offer, self._synced)

    def _unpack(self) -> Parcel:
        """Read it twice: nothing is done with a parcel before its SHA-384 is known to fit."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            with open(fd, "rb", buffering=0) as file:
                digest = hashlib.sha384()
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                if digest.hexdigest() != self.offer.sha384:
                    text = f"expected SHA-384 {self.offer.sha384[:24]}…, got {digest.hexdigest()[:24]}…"
                    raise TrustError("altered-parcel", f"cannot use the parcel: {text}")
                reach("incoming:checked")
                file.seek(0)
                return self._incoming.store(file, self.offer.sha384, "channel")
        except OSError as error:
            raise failed("read", self._path, error) from error

    def _check(self, parcel: Parcel) -> None:
        """It must be what was offered. A whole one that is something else is removed, too."""
        offer = self.offer
        kind = RECOVERY if offer.line == RECOVERY else "node"
        offered = (kind, offer.version, offer.digest, offer.target)
        if (parcel.kind, parcel.version, parcel.digest, parcel.target) != offered:
            self._incoming.remove(parcel)
            text = (
                f"cannot use the parcel: expected {kind} {offer.version}, got {parcel.kind} {parcel.version}"
            )
            raise TrustError("wrong-parcel", f"{text} of {parcel.digest[:12]}")

    def _fail(self, code: str, expected: str, got: str) -> InputError:
        self.discard()
        return InputError(code, f"cannot take the parcel: expected {expected}, got {got}")


def bad_offer(expected: str, got: str) -> InputError:
    return InputError("bad-offer", f"cannot take the offer: expected {expected}, got {got}")
