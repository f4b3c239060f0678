"""One version of the lab's system: a root image with its hash tree, a unified kernel image that names its hash."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from instar.core.errors import InputError
from instar_lab.osimage import initial, rootfs, uki
from instar_lab.osimage.packages import STUB, kernel_package, run, unpacked
from instar_server.trust.bundle import About, Built, build

BROKEN = {
    "": "sound",
    "panics": "process 1 ends at once",
    "hangs": "process 1 does nothing, and feeds no watchdog",
    "no-agent": "everything comes up but Instar",
}
BLOCK = 4096
UUIDS = ("00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002")
# A panic reboots at once, a hung machine too: the watchdog goes on through kexec.
COMMAND_LINE = "console=ttyS0 quiet loglevel=4 panic=-1 softlockup_panic=1 watchdog.stop_on_reboot=0"
HARDWARE = "instar-lab"


class Image(NamedTuple):
    """`root` and `kernel` are files; `bundle` too, with what is signed of it."""

    version: str
    root: Path
    kernel: Path
    bundle: Path
    built: Built


def make(
    version: str, folder: Path, cache: Path, broken: str = "", extra: Mapping[str, bytes] | None = None
) -> Image:
    """Build it below `folder`. The same arguments give the same bytes. Raises InputError, MachineError."""
    if broken not in BROKEN:
        names = ", ".join(name for name in BROKEN if name)
        raise InputError("unknown-variant", f"cannot build: expected one of {names}, got {broken!r}")
    folder.mkdir(parents=True, exist_ok=True)
    root, kernel = folder / f"{version}.root", folder / f"{version}.efi"
    blocks, roothash = _root(root, version, broken, extra or {}, cache)
    tree = unpacked([kernel_package()], cache)
    first = cache / f"{tree.name}.initial"
    if not first.exists():
        initial.build(tree, cache, first)
    line = f"{COMMAND_LINE} instar.roothash={roothash} instar.blocks={blocks}"
    added = {
        ".osrel": f"ID=instar-lab\nVERSION_ID={version}\nPRETTY_NAME=Instar lab {version}\n".encode(),
        ".cmdline": line.encode(),
        ".initrd": first.read_bytes(),
        ".linux": next((tree / "boot").glob("vmlinuz-*")).read_bytes(),
    }
    kernel.write_bytes(uki.build(STUB.read_bytes(), added))
    about = About("lab", version, (HARDWARE,), "x86_64")
    bundle = folder / f"{version}.bundle"
    return Image(version, root, kernel, bundle, build(about, root, kernel, bundle))


def _root(out: Path, version: str, broken: str, extra: Mapping[str, bytes], cache: Path) -> tuple[int, str]:
    """Write the image, its dm-verity tree behind it; (blocks of data, root hash)."""
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "root"
        rootfs.build(tree, version, broken, extra, cache)
        run("mkfs.erofs", "-zlz4hc,1", "--all-root", "-T0", "-U", UUIDS[0], str(out), str(tree))
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
