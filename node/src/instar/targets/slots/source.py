"""Where the chunks of an image come from: the running slot, as far as it has them, and the bundle by ranges."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from instar.core.errors import ServerUnreachable, TrustError
from instar.host.boot.slots import Slot
from instar.host.files import failed
from instar.trust.bundle import (
    BLOCK,
    HEAD,
    Bundle,
    Chunk,
    Image,
    bundle_digest,
    decode,
    ends,
    manifest_length,
)

GAP = 64 << 10  # bytes between two needed frames that are read rather than asked for anew
FIRST = 16 << 10  # bytes that are asked for first: a small bundle's manifest is in them
READ, RING = 512 << 10, 4  # bytes of one read; buffers


class Ranges(Protocol):
    """What `instar.host.transport.Transport.stream` offers."""

    def stream(
        self, path: str, start: int, stop: int | None = None
    ) -> AbstractContextManager[tuple[bool, Iterator[bytes]]]: ...


class Head(NamedTuple):
    """A bundle's manifest, and at which byte of the file the frames begin."""

    bundle: Bundle
    frames: int
    fetched: int  # bytes


class Place(NamedTuple):
    offset: int
    size: int


def read_head(
    source: Ranges, path: str, digest: str, length: int, spend: Callable[[int], None] = lambda _: None
) -> Head:
    """Fetch a bundle's manifest. `length` is what is signed of the whole bundle, in bytes; `spend` as of Frames.

    Raises TrustError `altered-bundle` unless it is the signed one: what is too long to be that is not read.
    """
    data = bytearray()
    _part(source, path, data, FIRST, spend)
    needed = HEAD + manifest_length(bytes(data[:HEAD])) if len(data) >= HEAD else HEAD
    if needed > length:
        text = f"cannot trust {path}: expected {length} bytes in all, got a manifest of {needed - HEAD}"
        raise TrustError("altered-bundle", text)
    if HEAD <= len(data) < needed:
        _part(source, path, data, needed, spend)
    if len(data) < needed:
        raise ServerUnreachable("cut-off", f"cannot read {path} on: it ended early")
    manifest = memoryview(data)[HEAD:needed]
    if bundle_digest(manifest) != digest:
        text = f"cannot trust {path}: expected a manifest of digest {digest[:16]}…, got {bundle_digest(manifest)[:16]}…"
        raise TrustError("altered-bundle", text)
    return Head(decode(bytes(manifest)), needed, len(data))


def _part(source: Ranges, path: str, data: bytearray, stop: int, spend: Callable[[int], None]) -> None:
    """Go on from the end of `data` up to `stop`, or less where the file ends before."""
    start = len(data)
    with source.stream(path, start, stop) as (resumed, pieces):
        if start and not resumed:
            raise _no_ranges(path, start)
        for piece in pieces:
            data += piece
            spend(len(piece))
            if len(data) >= stop:
                break
    del data[stop:]


def _no_ranges(path: str, start: int) -> ServerUnreachable:
    return ServerUnreachable(
        "no-ranges", f"cannot read {path} from byte {start} on: the server knows no ranges"
    )


def known(image: Image) -> dict[str, Place]:
    """The same as `index` for a slot that holds `image`, without reading it."""
    return {chunk.sha256: Place(chunk.offset, chunk.size) for chunk in image.chunks}


def index(slot: Slot, size: int) -> dict[str, Place]:
    """SHA-256 -> where the running slot has such a chunk, cut by the bundles' rule. Reads it once, whole.

    Raises MachineError `disk-failed`.
    """
    found: dict[str, Place] = {}
    digest, begin, at, count = hashlib.sha256(), 0, 0, 0
    for data in read_through(slot, min(size, slot.size)):
        hashed = 0
        for start in range(0, len(data), BLOCK):
            count += 1
            block = data[start : start + BLOCK]
            if ends(count, block):
                stop = start + len(block)
                digest.update(data[hashed:stop])
                found.setdefault(digest.hexdigest(), Place(begin, at + stop - begin))
                digest, begin, hashed, count = hashlib.sha256(), at + stop, stop, 0
        digest.update(data[hashed:])
        at += len(data)
    if at > begin:
        found.setdefault(digest.hexdigest(), Place(begin, at - begin))
    return found


def read_through(slot: Slot, size: int) -> Iterator[memoryview]:
    """The first `size` bytes of a slot from the disk itself, piece by piece, past the page cache where the disk can.

    A piece is good until RING - 1 more were taken. Fewer bytes where the device ends before. Raises MachineError
    `disk-failed`.
    """
    ring = itertools.cycle([memoryview(mmap.mmap(-1, READ)) for _ in range(RING)])
    at = 0
    try:
        fd = _open_direct(slot, next(ring))
        try:
            while at < size:
                wanted = min(READ, -(-(size - at) // BLOCK) * BLOCK)  # direct reads are of whole blocks
                buffer = next(ring)[:wanted]
                count = min(os.preadv(fd, [buffer], slot.offset + at), size - at)
                if not count:
                    return
                yield buffer[:count]
                at += count
        finally:
            os.posix_fadvise(fd, slot.offset, slot.size, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    except OSError as error:
        raise failed("read", slot.device, error) from error


def _open_direct(slot: Slot, scratch: memoryview) -> int:
    """To be read past the page cache; what that holds of the slot is dropped, too. That alone is done where it cannot
    be read past: on a file system in memory, or from an odd offset."""
    fd, direct = os.open(slot.device, os.O_RDONLY | os.O_CLOEXEC), -1
    os.posix_fadvise(fd, slot.offset, slot.size, os.POSIX_FADV_DONTNEED)
    try:
        direct = os.open(slot.device, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        os.preadv(direct, [scratch[:BLOCK]], slot.offset)
    except OSError:
        if direct >= 0:
            os.close(direct)
        return fd
    os.close(fd)
    return direct


class Frames:
    """Frames of a bundle in the order of the file, each read once. Neighbours come by one request."""

    def __init__(
        self, source: Ranges, path: str, start: int, needed: list[Chunk], spend: Callable[[int], None]
    ) -> None:
        """`needed` must be in the order of `at`. `spend` is told of each piece that came: the rate's cap."""
        self._source, self._path, self._start, self._needed = source, path, start, needed
        self._spend = spend
        self.fetched = 0

    def __iter__(self) -> Generator[tuple[Chunk, bytes]]:
        """Raises ServerUnreachable `cut-off` when the source ends early; what was yielded stays good."""
        at = 0
        while at < len(self._needed):
            run = self._run(at)
            yield from self._read(run)
            at += len(run)

    def _run(self, first: int) -> list[Chunk]:
        """The frames that one request brings."""
        run = [self._needed[first]]
        for chunk in self._needed[first + 1 :]:
            if chunk.at - (run[-1].at + run[-1].length) > GAP:
                break
            run.append(chunk)
        return run

    def _read(self, run: list[Chunk]) -> Iterator[tuple[Chunk, bytes]]:
        begin, stop = self._start + run[0].at, self._start + run[-1].at + run[-1].length
        with self._source.stream(self._path, begin, stop) as (resumed, pieces):
            if not resumed:
                raise _no_ranges(self._path, begin)
            held, position = bytearray(), run[0].at
            for chunk in run:
                end = chunk.at + chunk.length
                while position + len(held) < end:
                    piece = next(pieces, None)
                    if piece is None:
                        raise ServerUnreachable("cut-off", f"cannot read {self._path} on: it ended early")
                    held += piece
                    self.fetched += len(piece)
                    self._spend(len(piece))
                frame = bytes(held[chunk.at - position : end - position])
                del held[: end - position]
                position = end
                yield chunk, frame
