"""Where the chunks of an image come from: the running slot, as far as it has them, and the bundle by ranges."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from instar.core.errors import ServerUnreachable, TrustError
from instar.host.boot.slots import Slot
from instar.host.files import failed
from instar.trust.bundle import BLOCK, HEAD, Bundle, Chunk, bundle_digest, cut, decode, manifest_length

GAP = 64 << 10  # bytes between two needed frames that are read rather than asked for anew
READ = 1 << 20


class Ranges(Protocol):
    """What `instar.host.transport.Transport.stream` offers."""

    def stream(self, path: str, start: int) -> AbstractContextManager[tuple[bool, Iterator[bytes]]]: ...


class Head(NamedTuple):
    """A bundle's manifest, and at which byte of the file the frames begin."""

    bundle: Bundle
    frames: int
    fetched: int  # bytes


class Place(NamedTuple):
    offset: int
    size: int


def read_head(source: Ranges, path: str, digest: str) -> Head:
    """Fetch a bundle's manifest. Raises TrustError `altered-bundle` unless it is the signed one."""
    data = b""
    with source.stream(path, 0) as (_, chunks):
        needed = HEAD
        for chunk in chunks:
            data += chunk
            if needed == HEAD and len(data) >= HEAD:
                needed = HEAD + manifest_length(data[:HEAD])
            if needed > HEAD and len(data) >= needed:
                break
        else:
            raise ServerUnreachable("cut-off", f"cannot read {path} on: it ended early")
    manifest = data[HEAD:needed]
    if bundle_digest(manifest) != digest:
        text = f"cannot trust {path}: expected a manifest of digest {digest[:16]}…, got {bundle_digest(manifest)[:16]}…"
        raise TrustError("altered-bundle", text)
    return Head(decode(manifest), needed, len(data))


def index(slot: Slot, size: int) -> dict[str, Place]:
    """SHA-256 -> where the running slot has such a chunk, cut by the bundles' rule. Reads it once, whole.

    Raises MachineError `disk-failed`.
    """
    found: dict[str, Place] = {}
    offset = 0
    try:
        for data in cut(_blocks(slot, min(size, slot.size))):
            found.setdefault(hashlib.sha256(data).hexdigest(), Place(offset, len(data)))
            offset += len(data)
    except OSError as error:
        raise failed("read", slot.device, error) from error
    return found


def _blocks(slot: Slot, size: int) -> Iterator[bytes]:
    fd = os.open(slot.device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = 0
        while at < size:
            data = os.pread(fd, min(READ, size - at), slot.offset + at)
            if not data:
                return
            for start in range(0, len(data), BLOCK):
                yield data[start : start + BLOCK]
            at += len(data)
            os.posix_fadvise(fd, slot.offset + at - len(data), len(data), os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


class Frames:
    """Frames of a bundle in the order of the file, each read once. Neighbours come by one request."""

    def __init__(
        self, source: Ranges, path: str, start: int, needed: list[Chunk], spend: Callable[[int], None]
    ) -> None:
        """`needed` must be in the order of `at`. `spend` is told of each piece that came: the rate's cap."""
        self._source, self._path, self._start, self._needed = source, path, start, needed
        self._spend = spend
        self.fetched = 0

    def __iter__(self) -> Iterator[tuple[Chunk, bytes]]:
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
        begin = self._start + run[0].at
        with self._source.stream(self._path, begin) as (resumed, pieces):
            if not resumed:
                raise ServerUnreachable("no-ranges", f"cannot read {self._path} from byte {begin} on")
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
