"""The root file system's tree: Debian's Python and busybox, process_one.py, and nothing that a node does not use."""

from __future__ import annotations

import importlib.resources
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from instar_lab.osimage import guest
from instar_lab.osimage.packages import BUSYBOX, unpacked
from instar_lab.program import canonical

PACKAGES = (
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libexpat1", "zlib1g", "libssl3",
    "libffi8", "liblzma5", "libbz2-1.0", "libsqlite3-0", "libuuid1", "libcrypt1", "libgcc-s1", "libzstd1",
)  # fmt: skip
NOT_NEEDED = (
    "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/share/python3",
    "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/python3.11/test", "usr/lib/python3.11/idlelib",
    "usr/lib/python3.11/lib2to3", "usr/lib/python3.11/pydoc_data", "usr/lib/python3.11/ensurepip",
    "usr/lib/python3.11/distutils", "usr/lib/python3.11/tkinter",
)  # fmt: skip
LIBRARY = "usr/lib/python3.11"
MERGED = ("bin", "sbin", "lib", "lib64")
FOLDERS = ("proc", "sys", "dev", "run", "tmp", "efi", "data", "etc", "var")
APPLETS = (
    "sh",
    "mount",
    "umount",
    "ip",
    "cat",
    "ls",
    "sync",
    "dmesg",
    "kill",
    "sleep",
    "dd",
    "cp",
    "rm",
    "df",
)
RELEASE = """\
ID=instar-lab
PRETTY_NAME="Instar lab {version}"
VERSION_ID={version}
IMAGE_ID=lab
IMAGE_VERSION={version}
"""


def build(folder: Path, version: str, broken: str, extra: Mapping[str, bytes], cache: Path) -> None:
    """Make `folder` a root file system that calls itself `version`. `extra`: more files, by path below the root."""
    shutil.copytree(unpacked(PACKAGES, cache), folder, symlinks=True)
    for name in NOT_NEEDED:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in MERGED:
        _merge(folder, name)
    _compile(folder / LIBRARY)
    for name in FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    programs = folder / "usr/bin"
    shutil.copy(BUSYBOX, programs / "busybox")
    for applet in APPLETS:
        (programs / applet).symlink_to("busybox")
    (programs / "python3").symlink_to("python3.11")
    for name in ("process_one.py", "hands.py"):
        (folder / "usr/lib" / name).write_bytes((importlib.resources.files(guest) / name).read_bytes())
    init = folder / "usr/sbin/init"
    init.write_text("#!/usr/bin/sh\nexec /usr/bin/python3 -I -S -u /usr/lib/process_one.py\n")
    down = programs / "reboot"
    down.write_bytes((importlib.resources.files(guest) / "reboot").read_bytes())
    for program in (init, down):
        program.chmod(0o755)
    (programs / "poweroff").symlink_to("reboot")
    (folder / "etc/os-release").write_text(RELEASE.format(version=version))
    (folder / "etc/lab-version").write_text(f"{version} {broken}".strip() + "\n")
    if broken == "no-agent":
        shutil.rmtree(folder / LIBRARY / "asyncio")  # of all residents, only the agent needs it
    (folder / "etc/passwd").write_text("root:x:0:0::/:/usr/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\n")
    for path, data in extra.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def _compile(library: Path) -> None:
    """Compiled code in the place of each source: the root is read-only, so nobody else could keep it there, and a
    slow machine would need seconds for every start. Only by a Python of the same minor version."""
    if sys.version_info[:2] != (3, 11):
        return
    for path in sorted(library.rglob("*.py")):
        try:
            code = canonical.pyc(path.read_bytes(), str(path.relative_to(library)))
        except (SyntaxError, ValueError):
            continue
        path.with_suffix(".pyc").write_bytes(code)
        path.unlink()


def _merge(folder: Path, name: str) -> None:
    """Move `/name` below `/usr`, with a link in its place, as Debian does."""
    old, new = folder / name, folder / "usr" / name
    new.mkdir(exist_ok=True)
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(old)
    if not old.is_symlink():
        old.symlink_to(f"usr/{name}")
