"""Partitions, kernel images and the EFI system partition: read as they are, written so that nothing is half there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import struct
import uuid
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core.errors import InputError, MachineError
from instar.host import gpt
from instar.host.boot import esp
from instar.host.boot.finding import find_slots
from instar.host.boot.kexec import command_line
from instar.host.boot.running import running
from instar.host.boot.slots import Slot
from instar.host.files import Disk
from instar.trust import pe

NAMES = ("ESP", "instar-system-a", "instar-system-b")
DISK_BYTES = 4 << 20


def disk(block: int = 512) -> bytes:
    """A disk with three partitions of 64 blocks, and both tables."""
    entries = bytearray(128 * 128)
    for number, name in enumerate(NAMES):
        first = 100 + number * 64
        kind = gpt.ESP.bytes_le if number == 0 else uuid.UUID(int=7).bytes_le
        entry = gpt.ENTRY.pack(
            kind, uuid.UUID(int=number + 1).bytes_le, first, first + 63, 0, name.encode("utf-16-le")
        )
        entries[number * 128 : number * 128 + 128] = entry
    whole = bytearray(DISK_BYTES)
    last = DISK_BYTES // block - 1
    for own, other, table in ((1, last, 2), (last, 1, last - 40)):
        header = bytearray(
            gpt.HEADER.pack(
                gpt.SIGNATURE, 0x10000, 92, 0, 0, own, other, 100, last - 50, bytes(16), table, 128, 128,
                zlib.crc32(entries),
            )
        )  # fmt: skip
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        whole[own * block : own * block + 92] = header
        whole[table * block : table * block + len(entries)] = entries
    return bytes(whole)


@pytest.mark.parametrize("block", [512, 4096])
def test_partitions_are_read(tmp_path: Path, block: int) -> None:
    path = tmp_path / "disk"
    path.write_bytes(disk(block))
    found = gpt.partitions(path)
    assert [each.name for each in found] == list(NAMES)
    assert found[0].kind == gpt.ESP
    slot = gpt.named(found, "instar-system-b", path)
    assert (slot.number, slot.offset, slot.size) == (3, (100 + 128) * block, 64 * block)
    with pytest.raises(MachineError, match="expected one partition named x, got 0"):
        gpt.named(found, "x", path)


def test_damaged_first_table_is_replaced_by_the_second(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    data = bytearray(disk())
    data[1024 + 60] ^= 1  # in the first table's entries
    path.write_bytes(data)
    assert [each.name for each in gpt.partitions(path)] == list(NAMES)
    data[-512 + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(MachineError, match="neither of its two tables holds"):
        gpt.partitions(path)


@given(st.binary(max_size=2000))
def test_no_disk_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("d") / "disk"
    path.write_bytes(b"EFI PART".join([bytes(512), data]))
    with pytest.raises(MachineError):
        gpt.partitions(path)


def test_table_that_lies_beyond_any_disk_is_refused(tmp_path: Path) -> None:
    """Its checksum is good: it was made so."""
    path, data = tmp_path / "disk", bytearray(disk())
    fields = list(gpt.HEADER.unpack_from(data, 512))
    fields[3], fields[10] = 0, 1 << 62
    header = bytearray(gpt.HEADER.pack(*fields))
    struct.pack_into("<I", header, 16, zlib.crc32(header))
    data[512 : 512 + len(header)] = header
    path.write_bytes(data)
    with pytest.raises(MachineError, match="where no disk ends") as error:
        find_slots(path, NAMES[1:])
    assert error.value.code == "no-gpt"


# --- kernel images


def image(sections: dict[str, bytes]) -> bytes:
    """A PE file of nothing but headers and sections."""
    start, table = 64, 64 + pe.COFF.size
    data = bytearray(b"MZ" + bytes(start - 2))
    struct.pack_into("<I", data, pe.PE_AT, start)
    data += pe.COFF.pack(b"PE\0\0", 0x8664, len(sections), 0, 0, 0, 0, 0)
    at = table + pe.SECTION.size * len(sections)
    body = bytearray()
    for name, content in sections.items():
        padded = content + bytes(-len(content) % 16)
        data += pe.SECTION.pack(name.encode(), len(content), 0, len(padded), at + len(body), 0, 0, 0, 0, 0)
        body += padded
    return bytes(data + body)


def test_sections_are_found_and_read() -> None:
    file = io.BytesIO(image({".linux": b"kernel", ".cmdline": b"quiet\0"}))
    found = pe.sections(file)
    assert pe.read(file, found[".linux"], 100) == b"kernel"
    with pytest.raises(InputError, match="expected at most 3"):
        pe.read(file, found[".linux"], 3)


@given(st.integers(0, 200))
def test_image_that_is_cut_off_is_refused(keep: int) -> None:
    whole = image({".linux": b"kernel" * 20, ".initrd": b"files"})
    with pytest.raises(InputError, match="cannot read the kernel image"):
        pe.sections(io.BytesIO(whole[: min(keep, len(whole) - 16)]))


@given(st.binary(max_size=300))
def test_strange_image_breaks_nothing(data: bytes) -> None:
    try:
        pe.sections(io.BytesIO(b"MZ" + data))
    except InputError as error:
        assert error.code == "bad-pe"


def test_slots_name_goes_into_the_command_line_where_there_is_a_place_for_it() -> None:
    assert command_line(b"quiet slot=@SLOT@ \0\n", "b") == b"quiet slot=b instar.via=kexec"
    assert command_line(b"quiet\0", "b") == b"quiet instar.via=kexec"
    with pytest.raises(InputError, match="too long"):
        command_line(b"x" * 5000, "a")


# --- the EFI system partition


class Losing(Disk):
    """Loses power at the n-th call: what follows is not done."""

    def __init__(self, left: int) -> None:
        self.left = left

    def _step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise SystemExit

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        super().rename(old, new)

    def sync_file(self, path: Path) -> None:
        self._step()
        super().sync_file(path)

    def sync_folder(self, path: Path) -> None:
        self._step()
        super().sync_folder(path)


def test_image_is_placed_whole_or_not_at_all(tmp_path: Path) -> None:
    old, new = b"old" * 1000, b"new" * 2000
    path = tmp_path / "esp/EFI/instar/a.efi"
    path.parent.mkdir(parents=True)
    digest = hashlib.sha256(new).hexdigest()
    for left in range(4):
        path.write_bytes(old)
        try:
            esp.place(io.BytesIO(new), len(new), digest, path, Losing(left))
        except SystemExit:
            assert path.read_bytes() in (old, new)
        else:
            assert path.read_bytes() == new
            return
    raise AssertionError("it never came to its end")


def test_renamed_file_itself_is_synced(tmp_path: Path) -> None:
    """Linux 6.1's vfat leaves an empty file else."""
    calls: list[str] = []

    class Noting(Disk):
        def rename(self, old: Path, new: Path) -> None:
            calls.append(f"rename {new.name}")
            super().rename(old, new)

        def sync_file(self, path: Path) -> None:
            calls.append(f"sync {path.name}")
            super().sync_file(path)

        def sync_folder(self, path: Path) -> None:
            calls.append(f"sync {path.name}")
            super().sync_folder(path)

    esp.place(io.BytesIO(b"x"), 1, hashlib.sha256(b"x").hexdigest(), tmp_path / "a.efi", Noting())
    assert calls == ["rename a.efi", "sync a.efi", f"sync {tmp_path.name}"]


class Freeing(Disk):
    """Notes for each sync whether the file of this number is held open then: vfat would not have freed it yet."""

    def __init__(self, inode: int) -> None:
        self.inode, self.held = inode, list[bool]()

    def _look(self) -> None:
        found = set()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.add(os.fstat(int(name)).st_ino)
        self.held.append(self.inode in found)

    def sync_file(self, path: Path) -> None:
        super().sync_file(path)
        self._look()

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self._look()


def test_image_that_goes_is_held_until_its_folder_is_on_the_disk(tmp_path: Path) -> None:
    """Linux' vfat frees its clusters else, and a cut then leaves the old name without them."""
    path, other = tmp_path / "a.efi", tmp_path / "b.efi"
    path.write_bytes(b"old")
    disk = Freeing(path.stat().st_ino)
    esp.place(io.BytesIO(b"x"), 1, hashlib.sha256(b"x").hexdigest(), path, disk)
    assert disk.held == [True, True]
    other.write_bytes(b"other")
    disk = Freeing(path.stat().st_ino)
    esp.move(other, path, disk)
    assert disk.held[:2] == [True, True]
    disk = Freeing(path.stat().st_ino)
    esp.remove(path, disk)
    assert disk.held == [True]
    esp.remove(path, disk)  # absent is fine


def crossed(folder: Path, kept: str, left: str) -> tuple[Path, Path]:
    """Two names on the same blocks: on vfat a cut rename makes them, here a hard link. Skips where nobody can tell
    where a file lies."""
    one, two = folder / kept, folder / left
    one.write_bytes(os.urandom(9000))
    with one.open("rb") as file:
        os.fsync(file.fileno())
        try:
            fcntl.ioctl(file, esp.FIBMAP, struct.pack("i", 0))
        except PermissionError:
            pass  # the same content tells as much
        except OSError:
            pytest.skip("this file system does not tell where a file lies")
    os.link(one, two)
    return one, two


def test_name_on_the_clusters_of_another_file_is_set_aside(tmp_path: Path) -> None:
    """To remove it would free them: vfat knows no hard links."""
    kept, left = crossed(tmp_path, "a.efi", "a.efi.new")
    (tmp_path / "b.efi.new").write_bytes(b"cut off")
    data = kept.read_bytes()
    for number in (1, 2):
        text = f"set a.efi.new aside as a.efi.new.shared{number}: it lies on the clusters of a.efi; a write was cut off"
        assert text in esp.sweep(tmp_path)
        assert not left.exists()
        assert kept.stat().st_nlink == 1 + number, "none of its names was removed"
        os.link(kept, left)
    new = os.urandom(9000)
    esp.place(io.BytesIO(new), 9000, hashlib.sha256(new).hexdigest(), kept)
    aside = sorted(name for name in os.listdir(tmp_path) if name != "a.efi")
    assert aside == ["a.efi.new.shared1", "a.efi.new.shared2", "a.efi.new.shared3"]
    assert {(tmp_path / name).read_bytes() for name in aside} == {data}, "it was written over"
    assert kept.read_bytes() == new
    assert esp.sweep(tmp_path) == []


def test_wrong_or_short_image_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.efi"
    path.write_bytes(b"old")
    with pytest.raises(MachineError, match="expected SHA-256"):
        esp.place(io.BytesIO(b"new"), 3, "0" * 64, path)
    with pytest.raises(MachineError, match="2 of 5 bytes are missing"):
        esp.place(io.BytesIO(b"new"), 5, "0" * 64, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.efi"]


def test_room_for_two_images_and_a_temporary_one_is_asked_first(tmp_path: Path) -> None:
    esp.check_room(tmp_path, 1000)
    total = os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    with pytest.raises(MachineError, match="expected an EFI system partition of") as error:
        esp.check_room(tmp_path, total // 2)
    assert error.value.code == "esp-full"


def test_partition_that_is_read_only_is_refused_first() -> None:
    esp_there = read_only()
    with pytest.raises(MachineError, match="is read-only") as error:
        esp.check_room(esp_there, 0, 0)
    assert error.value.code == "mounted-read-only"


def read_only() -> Path:
    """A file system here that is mounted so; skips where there is none."""
    places = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in places:
        with contextlib.suppress(OSError):
            if os.statvfs(place).f_flag & os.ST_RDONLY:
                return Path(place)
    pytest.skip("no file system here is mounted read-only")


# --- the running slot


def test_running_slot_is_found_below_device_mapper_and_loop(tmp_path: Path) -> None:
    devices = tmp_path / "block"
    file = tmp_path / "slot-b.img"
    file.write_bytes(b"")
    (devices / "253:0/slaves/loop3").mkdir(parents=True)
    (devices / "253:0/slaves/loop3/dev").write_text("7:3\n")
    (devices / "7:3/loop").mkdir(parents=True)
    (devices / "7:3/loop/backing_file").write_text(f"{file}\n")
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "1 1 0:2 / /proc rw - proc proc rw\n"
        "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "21 20 253:0 / / ro - erofs /dev/mapper/root ro\n"
    )
    slots = [Slot("a", tmp_path / "slot-a.img", 0, 1), Slot("b", file, 0, 1)]
    assert running(slots, mounts, devices) == "b"
    assert running(slots[:1], mounts, devices) == ""
    assert running(slots, tmp_path / "absent", devices) == ""
