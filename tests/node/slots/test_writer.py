"""An image into a slot: from ranges and from the running slot, cut off anywhere, altered anywhere."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.core.errors import InputError, MachineError, ServerUnreachable, TrustError
from instar.host import zstd
from instar.host.boot.slots import Slot
from instar.host.files import Disk
from instar.targets.slots.source import FIRST, Frames, Head, index, known, read_head, read_through
from instar.targets.slots.writer import Writer, _alone, check_slot
from instar.trust.bundle import BLOCK, LENGTH, MAGIC, MAX_MANIFEST, MOST, Chunk
from instar_server.trust.bundle import About, Built, build
from tests.node.boot.test_disks import image as kernel_image

ABOUT = About("lab", "1.1.0", ("qemu",), "x86_64")
SIZE = 64 << 20
DECOMPRESS = zstd.decompressor()


class File:
    """Serves a file by ranges, as the server does; may end early, once, after so many bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.served, self.cut_after = path, 0, -1
        self.requests = self.asked = 0  # asked: bytes

    @contextlib.contextmanager
    def stream(
        self, _path: str, start: int, stop: int | None = None
    ) -> Iterator[tuple[bool, Iterator[bytes]]]:
        self.requests += 1
        self.asked += (stop or self.path.stat().st_size) - start
        yield True, self._pieces(start, stop)

    def _pieces(self, start: int, stop: int | None) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(start)
            end = file.seek(0, 2) if stop is None else stop
            file.seek(start)
            while piece := file.read(min(65_536, end - file.tell())):
                if 0 <= self.cut_after < self.served:
                    self.cut_after = -1
                    return
                self.served += len(piece)
                yield piece


def noise(count: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(count)


OLD = noise(3 << 20, 1) + noise(9 << 20, 2) + bytes(1 << 20)
NEW = OLD[: 3 << 20] + noise(5 * BLOCK, 3) + OLD[3 << 20 :]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    """The bundle of NEW; making it takes longest."""
    folder = tmp_path_factory.mktemp("bundle")
    root, kernel = folder / "root", folder / "kernel"
    root.write_bytes(NEW)
    kernel.write_bytes(kernel_image({".linux": b"k" * 9000, ".initrd": b"i" * 9000, ".cmdline": b"quiet"}))
    return folder / "bundle", build(ABOUT, root, kernel, folder / "bundle")


class World:
    """Slot A holds the running image; the bundle's image differs from it by what was put into its middle."""

    def __init__(self, folder: Path, bundle: Path, built: Built) -> None:
        self.new, self.built = NEW, built
        self.slots = []
        for name, data in (("a", OLD), ("b", b"")):
            path = folder / f"slot-{name}"
            path.write_bytes(data)
            os.truncate(path, SIZE)
            self.slots.append(Slot(name, path, 0, SIZE))
        shutil.copy(bundle, folder / "bundle")
        self.file = File(folder / "bundle")
        self.head: Head = read_head(self.file, "/b", built.custom["digest"], built.length)
        self.file.served = self.file.asked = 0
        self.local = index(self.slots[0], len(OLD))

    def writer(self, local: bool = True) -> Writer:
        found = self.local if local else {}
        return Writer(self.head.bundle.image("root"), self.slots[1], self.slots[0], found, DECOMPRESS)

    def frames(self, needed: list[Chunk]) -> Frames:
        return Frames(self.file, "/b", self.head.frames, needed, lambda _: None)

    def check(self) -> None:
        check_slot(self.head.bundle.image("root"), self.slots[1])
        assert self.slots[1].device.read_bytes()[: len(self.new)] == self.new


@pytest.fixture
def world(tmp_path: Path, made: tuple[Path, Built]) -> World:
    return World(tmp_path, *made)


def test_whole_image_comes_by_one_request(world: World) -> None:
    writer = world.writer(local=False)
    before = world.file.requests
    writer.write(0, world.frames, lambda _: None)
    world.check()
    assert world.file.requests == before + 1
    assert writer.reused == 0


def test_what_the_running_slot_has_is_not_fetched(world: World) -> None:
    writer = world.writer()
    writer.write(0, world.frames, lambda _: None)
    world.check()
    assert writer.fetched < len(world.new) * 0.05  # five blocks changed, in the middle, and all behind moved
    assert writer.reused > len(world.new) * 0.85


def test_only_what_is_needed_is_asked_for(world: World) -> None:
    writer = world.writer()
    writer.write(0, world.frames, lambda _: None)
    assert world.file.asked == world.file.served == writer.fetched


def test_manifest_says_what_reading_the_slot_says(world: World) -> None:
    writer = world.writer(local=False)
    writer.write(0, world.frames, lambda _: None)
    image = world.head.bundle.image("root")
    assert set(known(image)) == set(index(world.slots[1], image.size))
    data = world.slots[1].device.read_bytes()
    for sha256, place in known(image).items():
        assert hashlib.sha256(data[place.offset : place.offset + place.size]).hexdigest() == sha256


def test_running_slot_that_differs_from_its_index_is_used_no_more(world: World) -> None:
    """Its block was found at the index's word, and is another one by now: all the rest comes from the bundle."""
    with world.slots[0].device.open("r+b") as file:
        file.seek(6 << 20)
        file.write(b"altered")
    writer = world.writer()
    writer.write(0, world.frames, lambda _: None)
    world.check()
    assert 5 << 20 < writer.reused < 7 << 20
    assert writer.fetched > 5 << 20


def test_running_slot_is_never_written(world: World) -> None:
    before = world.slots[0].device.read_bytes()
    world.writer().write(0, world.frames, lambda _: None)
    assert world.slots[0].device.read_bytes() == before
    with pytest.raises(MachineError, match="the one that runs"):
        Writer(world.head.bundle.image("root"), world.slots[0], world.slots[0], {}, DECOMPRESS)


def test_cut_transfer_goes_on_from_its_checkpoint(world: World) -> None:
    marks = [0]
    world.file.cut_after = 10 << 20
    with pytest.raises(ServerUnreachable, match="ended early"):
        world.writer(local=False).write(0, world.frames, marks.append)
    assert marks[-1] >= (10 << 20) - 2 * MOST * BLOCK  # all that came, though the last sync was at 8 MiB
    served = world.file.served
    world.writer(local=False).write(marks[-1], world.frames, marks.append)
    world.check()
    assert world.file.served - served < len(world.new) - (7 << 20)


def test_flipped_bit_on_the_way_is_refused(world: World) -> None:
    data = bytearray(world.file.path.read_bytes())
    data[world.head.frames + 200_000] ^= 1
    world.file.path.write_bytes(data)
    with pytest.raises(TrustError) as error:
        world.writer(local=False).write(0, world.frames, lambda _: None)
    assert error.value.code == "altered-chunk"


def test_flipped_bit_in_the_manifest_is_refused(world: World) -> None:
    data = bytearray(world.file.path.read_bytes())
    data[100] ^= 1
    world.file.path.write_bytes(data)
    with pytest.raises(TrustError) as error:
        read_head(world.file, "/b", world.built.custom["digest"], world.built.length)
    assert error.value.code == "altered-bundle"


def test_manifest_that_cannot_be_the_signed_one_is_not_read(world: World) -> None:
    """It may come from anywhere, and is held in memory."""
    path = world.file.path
    for length, code in ((MAX_MANIFEST, "altered-bundle"), (MAX_MANIFEST + 1, "bad-bundle")):
        with path.open("r+b") as file:
            file.write(MAGIC + LENGTH.pack(length))
            file.truncate(MAX_MANIFEST + 4096)
        world.file.served = 0
        with pytest.raises((TrustError, InputError)) as error:
            read_head(world.file, "/b", world.built.custom["digest"], world.built.length)
        assert (error.value.code, world.file.served) == (code, FIRST)


def test_mounted_partition_is_not_opened(world: World) -> None:
    """A block device that somebody else has does not open this way; a file in its place has no such thing."""
    devices = [path for path in Path("/dev").iterdir() if path.is_block_device()]
    if not devices:
        pytest.skip("no block device here")
    assert _alone(Slot("b", devices[0], 0, 1)) == os.O_EXCL
    assert _alone(world.slots[1]) == 0


def test_flipped_bit_on_the_disk_is_found_when_it_is_read_back(world: World) -> None:
    world.writer().write(0, world.frames, lambda _: None)
    with world.slots[1].device.open("r+b") as file:
        file.seek(4 << 20)
        file.write(bytes((file.read(1)[0] ^ 1,)))
    with pytest.raises(MachineError) as error:
        check_slot(world.head.bundle.image("root"), world.slots[1])
    assert error.value.code == "not-as-written"


def test_slot_is_read_back_from_the_disk_and_not_from_memory(world: World) -> None:
    """All of it was written a moment ago, and lies in the page cache still."""
    world.writer().write(0, world.frames, lambda _: None)
    image, slot = world.head.bundle.image("root"), world.slots[1]
    if not comes_from_a_disk(slot.device.with_name("scratch")):
        pytest.skip("a file system in memory has no other place to read from")
    before = bytes_from_disks()
    check_slot(image, slot)
    assert bytes_from_disks() - before >= image.size


def bytes_from_disks() -> int:
    """How many this process has had read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def comes_from_a_disk(path: Path) -> bool:
    path.write_bytes(noise(1 << 20, 6))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = bytes_from_disks()
        file.read()
    return bytes_from_disks() > before


@pytest.mark.parametrize("offset", [0, 512, 4096, 1 << 20, 777])
@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, (3 << 20) + 100, 5 << 20])
@pytest.mark.parametrize("end", [0, 300])
def test_slot_is_read_wherever_it_begins_and_ends(
    tmp_path: Path, memory: Path, offset: int, size: int, end: int
) -> None:
    data = noise(size, 4)
    for folder in (tmp_path, memory):
        path = folder / "disk"
        path.write_bytes(noise(offset, 5) + data + bytes(end))
        slot = Slot("a", path, offset, size)
        assert b"".join(bytes(piece) for piece in read_through(slot, size)) == data
        longer = Slot("a", path, offset, size + (1 << 20))
        assert b"".join(bytes(piece) for piece in read_through(longer, longer.size)) == data + bytes(end)


class Broken(Disk):
    """A disk with a bad place."""

    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        if offset > 5 << 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().write_at(fd, data, offset)


def test_disk_that_fails_is_told(world: World) -> None:
    image, (running, slot) = world.head.bundle.image("root"), world.slots
    writer = Writer(image, slot, running, world.local, DECOMPRESS, Broken())
    marks: list[int] = []
    with pytest.raises(MachineError) as error:
        writer.write(0, world.frames, marks.append)
    assert error.value.code == "disk-failed"
    assert marks == []


def test_slot_that_is_too_small_is_refused_first(world: World) -> None:
    small = world.slots[1]._replace(size=1 << 20)
    with pytest.raises(MachineError, match="expected a slot of") as error:
        Writer(world.head.bundle.image("root"), small, world.slots[0], {}, DECOMPRESS)
    assert error.value.code == "slot-too-small"


def test_memory_does_not_grow_with_the_image(world: World) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    world.writer(local=False).write(0, world.frames, lambda _: None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 * 1024  # KiB
