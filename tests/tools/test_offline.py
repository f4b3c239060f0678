"""The judge of a disk that is off: sound disks pass, and every kind of damage that matters is seen."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from instar_lab.osimage import offline
from instar_lab.osimage.fat import Damaged, Fat
from instar_lab.osimage.offline import FALLBACK, Judge
from tests.tools.small_disk import BLOCK, BLOCKS, ESP_AT, SECTOR, SmallFat, System, disk

OLD, NEW = System("1.0.0", 1), System("1.1.0", 2)
A, B = "EFI/instar/a.efi", "EFI/instar/b.efi"
FILES = {
    A: OLD.kernel,
    B: NEW.kernel,
    FALLBACK: OLD.kernel,
    "EFI/instar/c.efi.new": b"half",
    "loader.conf": b"x",
}
SLOTS = {"a": OLD.root, "b": NEW.root}


def looked(whole: bytearray | bytes) -> offline.Found:
    published = {hashlib.sha256(each.kernel).hexdigest(): each.version for each in (OLD, NEW)}
    return Judge(published).look(memoryview(bytes(whole)))


def test_sound_disk_passes() -> None:
    found = looked(disk(FILES, SLOTS))
    assert found.faults == ()
    assert found.kernels == {A: "1.0.0", B: "1.1.0", FALLBACK: "1.0.0"}
    assert found.slots == {A: "a", B: "b", FALLBACK: "a"}


def test_kernel_image_whose_root_is_in_no_slot_is_seen() -> None:
    found = looked(disk(FILES, {"a": OLD.root, "b": OLD.root}))
    assert found.faults == (f"{B} is of 1.1.0, whose root is whole in no slot",)
    assert set(found.kernels) == {A, FALLBACK}


@pytest.mark.parametrize("block", [0, BLOCKS - 1, BLOCKS + 1, BLOCKS + 2, BLOCKS + 3])
def test_flipped_bit_in_a_root_or_its_tree_is_seen(block: int) -> None:
    root = bytearray(NEW.root)
    root[block * BLOCK + 5] ^= 1
    assert len(looked(disk(FILES, {"a": OLD.root, "b": bytes(root)})).faults) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes, no kernel image"),
        (bytes(len(NEW.kernel)), "no kernel image"),
        (NEW.kernel[: len(NEW.kernel) // 2], "ends behind the file"),
        (NEW.kernel[:-20] + b"x" * 20, "names no root|not of any image"),
        (NEW.kernel.replace(b"k" * 5000, b"k" * 4000 + bytes(1000)), "not of any image"),
    ],
)
def test_kernel_image_that_is_torn_is_seen(content: bytes, words: str) -> None:
    found = looked(disk({**FILES, B: content}, SLOTS))
    assert len(found.faults) == 1
    assert re.search(words, found.faults[0]), found.faults
    assert found.faults[0].startswith(B)


@pytest.mark.parametrize("path", [A, B, FALLBACK])
def test_chain_that_leads_into_nothing_is_seen(path: str) -> None:
    made = SmallFat(FILES)
    whole = disk(FILES, SLOTS)
    file = Fat(memoryview(made.data())).find(path)
    assert file is not None
    at = ESP_AT * SECTOR + made.table_at(file.cluster + 3)
    whole[at : at + 4] = bytes(4)
    found = looked(whole)
    assert len(found.faults) == 1
    assert "its chain leads to cluster 0x0" in found.faults[0]


def test_damaged_folder_and_partition_table_are_seen() -> None:
    whole = disk(FILES, SLOTS)
    whole[2 * SECTOR + 40] ^= 1
    assert looked(whole).faults == ("the partition table is not whole",)
    whole = disk(FILES, SLOTS)
    at = ESP_AT * SECTOR + SmallFat(FILES).table_at(2)
    whole[at : at + 4] = b"\1\0\0\0"
    assert "its chain leads to cluster 0x1" in looked(whole).faults[0]
    whole[ESP_AT * SECTOR : (ESP_AT + 1) * SECTOR] = bytes(SECTOR)
    assert looked(whole).faults == ("the first sector is no FAT32's",)


def test_no_kernel_image_is_no_fault_but_is_not_among_the_found() -> None:
    """Who asks knows which must be there."""
    found = looked(disk({"EFI/other/x.efi": b"x"}, SLOTS))
    assert (found.faults, found.kernels) == ((), {})


# --- files, as others write them


def test_files_that_share_a_cluster_are_told() -> None:
    made = SmallFat({"one.efi": b"1" * 2000, "two.efi": b"2" * 2000})
    data = bytearray(made.data())
    fat = Fat(memoryview(bytes(data)))
    one, two = fat.find("one.efi"), fat.find("TWO.EFI")
    assert one is not None
    assert two is not None
    assert fat.shared() == []
    at = made.table_at(two.cluster)
    data[at : at + 4] = (one.cluster + 1).to_bytes(4, "little")
    assert Fat(memoryview(bytes(data))).shared() == ["two.efi"]


def test_chain_that_runs_in_a_ring_is_no_file() -> None:
    made = SmallFat({"one.efi": b"1" * 2000})
    data = bytearray(made.data())
    at = made.table_at(4)
    data[at : at + 4] = (3).to_bytes(4, "little")
    with pytest.raises(Damaged):
        Fat(memoryview(bytes(data))).read("one.efi")


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(not all(map(shutil.which, ("mkfs.vfat", "mcopy", "mmd"))), reason="no mtools here")
def test_reader_agrees_with_mtools(tmp_path: Path) -> None:
    image, file = tmp_path / "esp", tmp_path / "file"
    run("mkfs.vfat", "-F", "32", "-C", str(image), "40960")
    run("mmd", "-i", str(image), "::/EFI", "::/EFI/a rather long name of a folder", "::/EFI/many")
    contents = {
        "EFI/a rather long name of a folder/Grün+2-0.efi": bytes(range(256)) * 999,
        "EFI/SHORT.TXT": b"",
    }
    contents |= {f"EFI/many/file number {number}": b"%d" % number * number for number in range(60)}
    for path, content in contents.items():
        file.write_bytes(content)
        run("mcopy", "-i", str(image), str(file), f"::/{path}")
    fat = Fat(memoryview(image.read_bytes()))
    assert {path: fat.read(path.upper()) for path, each in fat.walk() if not each.folder} == contents
    assert offline.fsck(image) == {}


@pytest.mark.skipif(shutil.which("veritysetup") is None, reason="no veritysetup here")
def test_own_check_of_a_tree_agrees_with_veritysetup(tmp_path: Path) -> None:
    for blocks in (2, 128, 129, 300):
        path = tmp_path / f"{blocks}"
        path.write_bytes(bytes(range(256)) * 16 * blocks)
        said = run(
            "veritysetup", "format", "--salt=-", f"--hash-offset={blocks * BLOCK}", str(path), str(path)
        )
        root = next(line.split()[-1] for line in said.splitlines() if line.startswith("Root hash"))
        data = bytearray(path.read_bytes().ljust(offline.verity_bytes(blocks), b"\0"))
        assert len(data) == offline.verity_bytes(blocks)
        assert offline.verity_holds(memoryview(data), blocks, root)
        data[-BLOCK] ^= 1
        assert not offline.verity_holds(memoryview(data), blocks, root)
