"""One version of the lab's system: a root image with its hash tree, a unified kernel image that names its hash.

The node's own program is not in it: it lies on the data partition, put there when the machine is made and
replaced by its own updates. So an image is built anew only when what it is made from has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.resources
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

from instar.core.errors import InputError
from instar_lab.osimage import guest, initial, rootfs, signing, uki
from instar_lab.osimage.packages import STUB, kernel_package, run, unpacked
from instar_lab.osimage.signing import Keys
from instar_server.trust.bundle import About, Built, build, describe

BROKEN = {
    "": "sound",
    "panics": "process 1 ends at once",
    "hangs": "process 1 does nothing, and feeds the watchdog no more",
    "hangs-early": "the kernel comes up, and stands still before it has any driver",
    "no-agent": "everything comes up but the agent: a part of Python that only it needs is not there",
    "no-node": "everything comes up but Instar",
    "no-network": "everything comes up, and reaches nobody",
    "wrong-hash": "the kernel image names a root that is in no slot",
}
BLOCK = 4096
# Not compressed, and data apart from inodes: a change then changes few blocks, and the bundle is smaller, too.
CHUNKED = f"--chunksize={BLOCK}"
UUIDS = ("00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002")
# A panic reboots at once. The time-stamp counter is not used: on a busy host, the kernel takes a wrong measure of an
# emulated one now and then, and a clock that runs six times too fast ends every lease.
COMMAND_LINE = "console=ttyS0 quiet loglevel=4 panic=-1 softlockup_panic=1 tsc=unstable"
NAME, HARDWARE, ARCH = "lab", "instar-lab", "x86_64"
SOURCES = ("initial.py", "rootfs.py", "signing.py", "uki.py", "variant.py", "packages.py")
KEPT_S = 86_400.0
INSIDE = ("first.sh", "process_one.py", "hands.py", "reboot")


class Image(NamedTuple):
    """`root` and `kernel` are files; `bundle` too, with what is signed of it."""

    version: str
    root: Path
    kernel: Path
    bundle: Path
    built: Built


def kept(version: str, cache: Path, broken: str = "", keys: Keys | None = None) -> Image:
    """As `make`, but from the cache when it was made from the same before: half a minute the first time.

    Raises InputError, MachineError.
    """
    _check(broken)
    name = f"{version}-{broken or 'sound'}{'-signed' if keys else ''}-{_inputs(cache, keys)[:16]}"
    folder = cache / "images" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            unfinished = folder.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(version, unfinished, cache, broken, keys=keys)
            unfinished.rename(folder)
            _sweep(folder, name.rpartition("-")[0])
    root, kernel, bundle = _files(folder, version)
    return Image(version, root, kernel, bundle, describe(bundle))


def _sweep(kept: Path, prefix: str) -> None:
    """Remove what was made of older sources, and is in no test's hands any more."""
    for folder in kept.parent.glob(f"{prefix}-{'?' * 16}"):
        if folder != kept and time.time() - folder.stat().st_mtime > KEPT_S:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


def make(
    version: str,
    folder: Path,
    cache: Path,
    broken: str = "",
    extra: Mapping[str, bytes] | None = None,
    keys: Keys | None = None,
) -> Image:
    """Build it below `folder`. The same arguments give the same bytes, but for signatures by `keys`.

    Raises InputError, MachineError.
    """
    _check(broken)
    folder.mkdir(parents=True, exist_ok=True)
    root, kernel, bundle = _files(folder, version)
    blocks, roothash = _root(root, version, broken, extra or {}, cache)
    if broken == "wrong-hash":
        roothash = hashlib.sha256(roothash.encode()).hexdigest()
    line = f"{COMMAND_LINE} instar.roothash={roothash} instar.blocks={blocks}"
    if broken == "hangs-early":
        line += " lab.hangs=early"
    _kernel(kernel, version, line, cache, keys)
    about = About(NAME, version, (HARDWARE,), ARCH)
    return Image(version, root, kernel, bundle, build(about, root, kernel, bundle))


def _check(broken: str) -> None:
    if broken not in BROKEN:
        names = ", ".join(name for name in BROKEN if name)
        raise InputError("unknown-variant", f"cannot build: expected one of {names}, got {broken!r}")


def _files(folder: Path, version: str) -> tuple[Path, Path, Path]:
    return folder / f"{version}.root", folder / f"{version}.efi", folder / f"{version}.bundle"


def _inputs(cache: Path, keys: Keys | None) -> str:
    """A digest of what an image is made from, as far as it does not stand in its name."""
    hashed = hashlib.sha256(f"{OWN} {kernel_package()}".encode())
    for name in INSIDE:
        hashed.update(json.dumps([name, _digest(importlib.resources.files(guest) / name)]).encode())
    if keys is not None:
        hashed.update(keys.certificate("db").read_bytes())
    return hashed.hexdigest()


def _digest(path: Traversable) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Of the code that runs, which was read just now: the files may be others when it is asked for.
OWN = " ".join(_digest(Path(__file__).with_name(name)) for name in SOURCES)


def _kernel(out: Path, version: str, line: str, cache: Path, keys: Keys | None) -> None:
    tree = unpacked([kernel_package()], cache)
    release = f"ID=instar-lab\nVERSION_ID={version}\nPRETTY_NAME=Instar lab {version}\n"
    with tempfile.TemporaryDirectory() as name:
        first, linux = Path(name) / "initial", Path(name) / "linux"
        initial.build(tree, cache, first)
        shutil.copy(next((tree / "boot").glob("vmlinuz-*")), linux)
        if keys is not None:
            signing.sign_kernel(linux, keys)
        added = {
            ".osrel": release.encode(),
            ".cmdline": line.encode(),
            ".initrd": first.read_bytes(),
            ".linux": linux.read_bytes(),
        }
    out.write_bytes(uki.build(STUB.read_bytes(), added))
    if keys is not None:
        signing.sign(out, keys)


def _root(out: Path, version: str, broken: str, extra: Mapping[str, bytes], cache: Path) -> tuple[int, str]:
    """Write the image, its dm-verity tree behind it; (blocks of data, root hash)."""
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "root"
        rootfs.build(tree, version, broken, extra, cache)
        run("mkfs.erofs", CHUNKED, "--all-root", "-T0", "-U", UUIDS[0], str(out), str(tree))
        shutil.rmtree(tree)
    size = out.stat().st_size
    said = run(
        "veritysetup", "format", "--salt=-", f"--uuid={UUIDS[1]}", f"--hash-offset={size}", str(out), str(out)
    )
    roothash = next(line.split()[-1] for line in said.splitlines() if line.startswith("Root hash"))
    whole = -(-out.stat().st_size // BLOCK) * BLOCK
    with out.open("r+b") as file:
        file.truncate(whole)
    return size // BLOCK, roothash
