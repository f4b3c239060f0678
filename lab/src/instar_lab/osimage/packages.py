"""Debian packages unpacked into folders: fetched by apt once, kept in a cache, never installed."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from instar.core.errors import MachineError

FETCH_S = 300.0
KERNEL = "linux-image-amd64"  # the one for clouds has no watchdog that outlives kexec

# What the images are built with, and run by: program -> Debian package.
NEEDED = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
    "sgdisk": "gdisk",
    "mkfs.erofs": "erofs-utils",
    "veritysetup": "cryptsetup-bin",
    "mkfs.ext4": "e2fsprogs",
    "cpio": "cpio",
    "zstd": "zstd",
    "sbsign": "sbsigntool",
}
FILES = {
    Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub"): "systemd-boot-efi",
    Path("/usr/share/OVMF/OVMF_CODE_4M.fd"): "ovmf",
    Path("/bin/busybox"): "busybox-static",
    Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi"): "systemd-boot-efi",
    Path("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"): "ovmf",
}
STUB, FIRMWARE, BUSYBOX, LOADER, SECURE_FIRMWARE = FILES


def missing() -> list[str]:
    """Names of the Debian packages that are needed here and are not there."""
    programs = {package for program, package in NEEDED.items() if shutil.which(program, path=PATH) is None}
    return sorted(programs | {package for path, package in FILES.items() if not path.exists()})


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def unpacked(names: Sequence[str], cache: Path) -> Path:
    """A folder with the content of these packages, and of nothing else. Raises MachineError `no-packages`.

    Made once for each list of names; it gets its name last, so what has that name is complete.
    """
    name = f"debs-{hashlib.sha256(' '.join(sorted(names)).encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tree = cache / name
        if tree.is_dir():
            return tree
        unfinished, debs = cache / f"{name}.unfinished", cache / f"{name}.debs"
        for folder in (unfinished, debs):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        run("apt-get", "download", *names, folder=debs)
        for deb in sorted(debs.iterdir()):
            run("dpkg-deb", "--extract", str(deb), str(unfinished))
        shutil.rmtree(debs)
        return unfinished.rename(tree)


def kernel_package() -> str:
    """The package behind the name that always means the newest kernel."""
    for line in run("apt-cache", "depends", KERNEL).splitlines():
        word, _, package = line.strip().partition(": ")
        if word == "Depends" and package.startswith("linux-image-"):
            return package
    raise MachineError("no-packages", f"cannot find the package of {KERNEL}: run apt-get update first")


def run(*words: str, folder: Path | None = None) -> str:
    """Run a program that must end well; what it said. Raises MachineError `no-packages`."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=FETCH_S, check=False, cwd=folder,
            stdin=subprocess.DEVNULL, env={"PATH": PATH, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("no-packages", f"cannot run {words[0]}: {error}") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-1000:]
        raise MachineError("no-packages", f"cannot {' '.join(words)[:200]}: {said}")
    return done.stdout
