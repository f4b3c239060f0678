"""An image into a slot: each chunk checked before it is written, checkpoints on the way, all read back at the end.

The running slot is only read. A kill leaves a slot that says 'writing', to be gone on with from its checkpoint:
what lies before that is on the disk, and is checked once more when the whole is read back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from instar.core.errors import InputError, InstarError, MachineError, ServerUnreachable, TrustError
from instar.host.boot.slots import Slot
from instar.host.files import DISK, Disk, failed
from instar.host.points import reach
from instar.host.zstd import Decompress
from instar.targets.slots.belt import Behind, Belt
from instar.targets.slots.source import READ, Frames, Place, read_through
from instar.trust.bundle import BLOCK, MOST, Chunk, Image

CHECKPOINT = 8 << 20  # bytes between two that are synced
ZEROS = bytes(MOST * BLOCK)

Opened = Callable[[list[Chunk]], Frames]


class Differs(Exception):
    """The running slot has not what its index says, or cannot be read: from now on everything is fetched."""


class Writer:
    """Writes `image` into `slot`, of which it needs `image.size` bytes. `local` is the running slot's index, which
    is not trusted: what is taken from there is checked as what is fetched is."""

    def __init__(
        self,
        image: Image,
        slot: Slot,
        running: Slot | None,
        local: Mapping[str, Place],
        decompress: Decompress,
        disk: Disk = DISK,
    ) -> None:
        if image.size > slot.size:
            text = f"cannot install: expected a slot of {image.size} bytes at least, got {slot.size}"
            raise MachineError("slot-too-small", text)
        if running is not None and os.path.realpath(running.device) == os.path.realpath(slot.device) and (
            running.offset < slot.offset + slot.size and slot.offset < running.offset + running.size
        ):  # fmt: skip
            raise MachineError("slot-runs", f"cannot write slot {slot.name}: it is the one that runs")
        self._image, self._slot, self._running, self._local = image, slot, running, local
        self._decompress, self._disk = decompress, disk
        self.done = 0  # bytes of the image, from its beginning, that are written; not all on the disk yet
        self.reused = self.fetched = 0  # bytes of the image; of the bundle

    def write(self, start: int, frames: Opened, checkpoint: Callable[[int], None]) -> None:
        """From byte `start` of the image, a chunk's beginning, to its end. `checkpoint` is told how far
        everything is on the disk. Raises ServerUnreachable (go on later), TrustError, MachineError."""
        chunks = [chunk for chunk in self._image.chunks if chunk.offset >= start]
        try:
            fd = os.open(self._slot.device, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | _alone(self._slot))
        except OSError as error:
            raise failed("write", self._slot.device, error) from error
        source = None
        try:
            source = self._source()
            with Behind(self._disk, fd, self._slot.offset + start, CHECKPOINT) as behind:
                self._write(behind, source, chunks, frames, checkpoint)
        except OSError as error:
            raise failed("write", self._slot.device, error) from error
        finally:
            os.close(fd)
            if source is not None:
                os.close(source)

    def _source(self) -> int | None:
        if self._running is None or not self._local:
            return None
        try:
            return os.open(self._running.device, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # what cannot be taken from there is fetched
            return None

    def _write(
        self,
        behind: Behind,
        source: int | None,
        chunks: list[Chunk],
        frames: Opened,
        checkpoint: Callable[[int], None],
    ) -> None:
        base, told = self._slot.offset, behind.safe

        def tell() -> None:
            nonlocal told
            self.done = behind.written - base
            if behind.safe > told:
                told = behind.safe
                checkpoint(told - base)
                reach("slot:checkpoint")

        left = deque(chunks)
        try:
            while left:
                self._some(behind, source, left, frames, tell)
        except InstarError:  # the next try goes on behind all that came
            behind.finish()
            tell()
            raise
        behind.finish()
        self.done = behind.written - base

    def _some(
        self,
        behind: Behind,
        source: int | None,
        left: deque[Chunk],
        frames: Opened,
        tell: Callable[[], None],
    ) -> None:
        """All that is left, or what came before the running slot was found to differ. What was checked, and is
        about to be written, is taken off `left`."""

        def check(item: tuple[Chunk, bytes]) -> None:
            chunk, frame = item
            behind.put((self._slot.offset + chunk.offset, self._content(source, chunk, frame)), chunk.size)
            left.popleft()

        opened = frames([chunk for chunk in left if self._is_fetched(source, chunk)])
        with contextlib.closing(iter(opened)) as coming, Belt("slot-checker", check) as checker:
            try:
                for chunk in tuple(left):
                    frame = next(coming)[1] if self._is_fetched(source, chunk) else b""
                    checker.put((chunk, frame), len(frame) or chunk.size)
                    tell()
                checker.finish()
            except (ServerUnreachable, TrustError):
                with contextlib.suppress(Differs):
                    checker.finish()
                raise
            except Differs:
                self._local = {}
            finally:
                self.fetched += opened.fetched

    def _has(self, source: int | None, chunk: Chunk) -> bool:
        place = self._local.get(chunk.sha256)
        return source is not None and place is not None and place.size == chunk.size

    def _is_fetched(self, source: int | None, chunk: Chunk) -> bool:
        return chunk.length > 0 and not self._has(source, chunk)

    def _content(self, source: int | None, chunk: Chunk, frame: bytes) -> bytes:
        """The chunk's bytes, as signed, from its frame, or where it has none from the running slot. Raises Differs,
        TrustError `altered-chunk`."""
        if not chunk.length:
            return ZEROS[: chunk.size]
        if not frame:
            return self._taken(source, chunk)
        try:
            data = self._decompress(frame, chunk.size)
        except InputError as error:
            raise TrustError("altered-chunk", f"chunk at {chunk.offset}: {error.text}") from None
        if len(data) != chunk.size or hashlib.sha256(data).hexdigest() != chunk.sha256:
            text = f"cannot trust the chunk at {chunk.offset}: expected SHA-256 {chunk.sha256[:16]}…"
            raise TrustError("altered-chunk", text)
        return data

    def _taken(self, source: int | None, chunk: Chunk) -> bytes:
        assert source is not None
        assert self._running is not None
        place = self._local[chunk.sha256]
        try:
            data = os.pread(source, place.size, self._running.offset + place.offset)
        except OSError:  # a bad place of the disk must not keep the node from its next system
            raise Differs from None
        if hashlib.sha256(data).hexdigest() != chunk.sha256:
            raise Differs
        self.reused += len(data)
        return data


def _alone(slot: Slot) -> int:
    """Of a block device: it opens only where nobody else has it, so no mounted file system is ever written (EBUSY)."""
    return os.O_EXCL if stat.S_ISBLK(os.stat(slot.device).st_mode) else 0


def begun(image: Image, path: Path) -> int:
    """How many bytes of `image` a file has, from its beginning, in whole chunks; each is checked. 0 where none can be
    read."""
    done = 0
    with contextlib.suppress(OSError), path.open("rb") as file:
        for chunk in image.chunks:
            if hashlib.sha256(file.read(chunk.size)).hexdigest() != chunk.sha256:
                break
            done = chunk.offset + chunk.size
    return done


def check_slot(image: Image, slot: Slot, progress: Callable[[int], None] = lambda _: None) -> None:
    """Read the slot back from the disk itself. Raises MachineError `not-as-written`."""
    whole, done = hashlib.sha256(), 0
    with Belt("slot-reader", whole.update, most=READ) as hashing:  # one waits, one is hashed, and one is read
        for data in read_through(slot, image.size):
            hashing.put(data, len(data))
            done += len(data)
            progress(done)
        hashing.finish()
    if done != image.size or whole.hexdigest() != image.sha256:
        text = f"cannot trust slot {slot.name}: expected SHA-256 {image.sha256[:16]}…, got {whole.hexdigest()[:16]}…"
        raise MachineError("not-as-written", text)
