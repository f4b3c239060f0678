"""The initial file system: busybox, dmsetup, the drivers in the order in which they need each other, first.sh."""

from __future__ import annotations

import importlib.resources
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from instar.core.errors import MachineError
from instar_lab.osimage import guest
from instar_lab.osimage.packages import BUSYBOX, PATH, unpacked

DRIVERS = (
    "i6300esb", "crc32c_generic", "libcrc32c", "nvme", "dm-verity", "erofs", "ext4", "efivarfs", "nls_cp437",
    "nls_ascii", "vfat", "virtio_pci", "virtio_net", "virtio_console", "qemu_fw_cfg",
)  # fmt: skip
# What the kernel takes from its command line for what is built in, a module has to be told. The watchdog goes on
# while one kernel jumps into the next: else nobody ends one that hangs before it has drivers.
ARGUMENTS = {"watchdog": "stop_on_reboot=0", "i6300esb": "heartbeat=60"}
MAPPER = ("dmsetup", "libdevmapper1.02.1", "libc6", "libselinux1", "libudev1", "libpcre2-8-0")
LIBRARIES = (
    "libdevmapper.so.1.02.1",
    "libselinux.so.1",
    "libudev.so.1",
    "libc.so.6",
    "libm.so.6",
    "libpcre2-8.so.0",
)
DEPENDS = re.compile(rb"depends=([^\0]*)\0")


def build(kernel: Path, cache: Path, out: Path) -> None:
    """Write the compressed archive to `out`. `kernel` is the kernel's unpacked package. Raises MachineError."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("bin", "modules", "proc", "sys", "dev", "lib64", "lib/x86_64-linux-gnu"):
            (root / folder).mkdir(parents=True)
        shutil.copy(BUSYBOX, root / "bin/busybox")
        first = importlib.resources.files(guest) / "first.sh"
        (root / "init").write_bytes(first.read_bytes())
        (root / "init").chmod(0o755)
        _mapper(unpacked(MAPPER, cache), root)
        order = _ordered(kernel)
        for driver in order:
            shutil.copy(driver, root / "modules" / driver.name)
        lines = [f"{driver.name} {ARGUMENTS.get(driver.stem, '')}".rstrip() for driver in order]
        (root / "modules/order").write_text("\n".join(lines) + "\n")
        _pack(root, out)


def _mapper(tree: Path, root: Path) -> None:
    shutil.copy(tree / "sbin/dmsetup", root / "bin/dmsetup")
    for name in LIBRARIES:
        source = next(iter(sorted(tree.rglob(name))), None)
        if source is None:
            raise MachineError("no-packages", f"cannot build the initial file system: no {name}")
        shutil.copy(source.resolve(), root / "lib/x86_64-linux-gnu" / name)
    loader = next(iter(sorted(tree.rglob("ld-linux-x86-64.so.2"))))
    shutil.copy(loader.resolve(), root / "lib64/ld-linux-x86-64.so.2")


def _ordered(kernel: Path) -> list[Path]:
    """Each driver behind those that it names in its `depends`."""
    files = {path.stem.replace("-", "_"): path for path in kernel.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in order:
            return  # built in
        match = DEPENDS.search(path.read_bytes())
        for each in (match[1].decode() if match else "").split(","):
            add(each)
        order.append(path)

    for driver in DRIVERS:
        add(driver)
    return order


def _pack(root: Path, out: Path) -> None:
    """Reproducible: names in order, no owners, no times."""
    for path in sorted(root.rglob("*")):
        if not path.is_symlink():
            _touch(path)
    script = (
        "find . -mindepth 1 | LC_ALL=C sort | cpio -o -H newc --quiet --reproducible -R 0:0 | zstd -q -19 -T1"
    )
    with out.open("wb") as file:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", script], cwd=root, stdout=file, stderr=subprocess.PIPE, check=False,
            env={"PATH": PATH}, timeout=120,
        )  # fmt: skip
    if done.returncode != 0:
        raise MachineError("not-built", f"cannot pack the initial file system: {done.stderr.decode()[-500:]}")


def _touch(path: Path) -> None:
    import os

    os.utime(path, (0, 0), follow_symlinks=False)
