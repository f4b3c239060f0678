"""A disk to start from: GPT with an EFI system partition, two slots and a data partition; no loop mounts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from instar_lab.osimage.packages import LOADER, run
from instar_lab.osimage.variant import Image

MIB = 1 << 20
START = 1 * MIB
ESP_MIB, SLOT_MIB, DATA_MIB = 160, 48, 96
SLOTS = ("instar-system-a", "instar-system-b")
# Where what begins, in MiB, by the partition's place in the table.
AT_MIB = {"esp": 1, "a": 1 + ESP_MIB, "b": 1 + ESP_MIB + SLOT_MIB, "data": 1 + ESP_MIB + 2 * SLOT_MIB}
FALLBACK = "EFI/BOOT/BOOTX64.EFI"


def make(out: Path, image: Image, data: Path, counting: bool = False) -> None:
    """Write the disk: `image` in slot A and as the firmware's fallback, `data`'s content on the data partition.

    `counting`: systemd-boot starts the slots, and counts their tries; it is the firmware's fallback then.
    """
    total = START // MIB + ESP_MIB + 2 * SLOT_MIB + DATA_MIB + 1
    out.unlink(missing_ok=True)
    run("truncate", "-s", f"{total}M", str(out))
    run(
        "sgdisk", "-o",
        "-n", f"1:2048:+{ESP_MIB}M", "-t", "1:ef00", "-c", "1:ESP",
        "-n", f"2:0:+{SLOT_MIB}M", "-c", f"2:{SLOTS[0]}",
        "-n", f"3:0:+{SLOT_MIB}M", "-c", f"3:{SLOTS[1]}",
        "-n", f"4:0:+{DATA_MIB}M", "-c", "4:instar-data", str(out),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        esp = Path(name) / "esp"
        _esp(esp, image, counting)
        _put(esp, out, "esp")
    _put(image.root, out, "a")
    put_data(out, data)


def put_data(disk: Path, content: Path) -> None:
    """A new data partition with `content` on the disk of a machine that is off."""
    with tempfile.TemporaryDirectory(dir=disk.parent) as name:
        stored = Path(name) / "data"
        run("truncate", "-s", f"{DATA_MIB}M", str(stored))
        run("mkfs.ext4", "-q", "-E", "root_owner=0:0", "-d", str(content), str(stored))
        _put(stored, disk, "data")


def _put(source: Path, disk: Path, where: str) -> None:
    at = f"seek={AT_MIB[where]}"
    run("dd", f"if={source}", f"of={disk}", "bs=1M", at, "conv=notrunc,sparse", "status=none")


def _esp(path: Path, image: Image, counting: bool) -> None:
    run("mkfs.vfat", "-F", "32", "-n", "ESP", "-C", str(path), str(ESP_MIB * 1024))
    files = {"EFI/instar/a.efi": image.kernel, FALLBACK: image.kernel}
    if counting:
        settings = path.with_name("loader.conf")
        settings.write_text("default instar-a*\ntimeout 0\n")
        files = {
            "EFI/Linux/instar-a.efi": image.kernel,
            "EFI/systemd/systemd-bootx64.efi": LOADER,
            FALLBACK: LOADER,
            "loader/loader.conf": settings,
        }
    folders: list[str] = []
    for name in files:
        folders += [
            str(parent) for parent in reversed(Path(name).parents) if str(parent) not in (".", *folders)
        ]
    run("mmd", "-i", str(path), *(f"::/{folder}" for folder in folders))
    for name, source in files.items():
        run("mcopy", "-i", str(path), str(source), f"::/{name}")


def esp_of(disk: Path, out: Path) -> Path:
    """Copy the EFI system partition of a machine that is off, to be looked at by mtools."""
    run("dd", f"if={disk}", f"of={out}", "bs=1M", "skip=1", f"count={ESP_MIB}", "conv=sparse", "status=none")
    return out


def copy(source: Path, out: Path) -> Path:
    """A copy that shares nothing and stays sparse."""
    if out.exists():
        out.unlink()
    run("cp", "--sparse=always", "--reflink=auto", str(source), str(out))
    shutil.copymode(source, out)
    return out
