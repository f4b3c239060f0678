"""A disk to start from: GPT with an EFI system partition, two slots and a data partition; no loop mounts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from instar_lab.osimage.packages import run
from instar_lab.osimage.variant import Image

MIB = 1 << 20
START = 1 * MIB
ESP_MIB, SLOT_MIB, DATA_MIB = 160, 48, 96
SLOTS = ("instar-system-a", "instar-system-b")


def make(out: Path, image: Image, data: Path) -> None:
    """Write the disk: `image` in slot A and as the firmware's fallback, `data`'s content on the data partition."""
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
        esp, stored = Path(name) / "esp", Path(name) / "data"
        _esp(esp, image)
        _data(stored, data)
        for source, at in ((esp, 1), (image.root, 1 + ESP_MIB), (stored, 1 + ESP_MIB + 2 * SLOT_MIB)):
            run(
                "dd", f"if={source}", f"of={out}", "bs=1M", f"seek={at}", "conv=notrunc,sparse", "status=none"
            )


def _esp(path: Path, image: Image) -> None:
    run("mkfs.vfat", "-F", "32", "-n", "ESP", "-C", str(path), str(ESP_MIB * 1024))
    run("mmd", "-i", str(path), "::/EFI", "::/EFI/BOOT", "::/EFI/instar")
    for name in ("EFI/instar/a.efi", "EFI/BOOT/BOOTX64.EFI"):
        run("mcopy", "-i", str(path), str(image.kernel), f"::/{name}")


def _data(path: Path, content: Path) -> None:
    run("truncate", "-s", f"{DATA_MIB}M", str(path))
    run("mkfs.ext4", "-q", "-E", "root_owner=0:0", "-d", str(content), str(path))


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
