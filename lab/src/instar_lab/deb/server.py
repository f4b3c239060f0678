"""The server's package: our code, and exactly the Python packages that requirements/server.txt names.

They are taken from the environment that `make setup` has made of the locked, hash-checked wheels: each file's
hash is compared with its wheel's own list again, so that what was altered there since does not get in. What an
installer adds (scripts, compiled files, its own notes) stays out: the wheels alone decide the bytes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from instar.core.errors import InputError, MachineError
from instar_lab.deb.tree import ROOT, Tree
from instar_lab.program.build import check_version, version_file

LOCK = ROOT / "requirements" / "server.txt"
HOME = "usr/lib/instar-server"
OURS = {"instar": ROOT / "node/src/instar", "instar_server": ROOT / "server/src/instar_server"}
SHARED = ("core", "trust", "wire")  # what the server has in common with a node
# They are in the lock to build our own wheels.
NOT_NEEDED = {"hatchling", "pathspec", "pluggy", "tomlkit", "trove-classifiers"}
OF_INSTALLERS = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json")
# Whom to trust on the web is the machine's business, and its list is kept fresh.
LINKS = {"certifi/cacert.pem": "/etc/ssl/certs/ca-certificates.crt"}
LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)\s*(;.*?)?\s*\\?$", re.MULTILINE)
GLIBC = re.compile(r"manylinux_2_(\d+)_")
OLDEST_GLIBC = 28
VERSION = re.compile(r'^VERSION = ".*"$', re.MULTILINE)


def server_package(version: str, out: Path) -> Path:
    """Raises InputError `altered-package`, `package-missing`; MachineError `no-package`."""
    check_version(version)
    tree = Tree("instar-server", "server")
    for package, folder in OURS.items():
        for path, data in _ours(package, folder, version):
            tree.put(f"{HOME}/{path}", data)
    glibc = OLDEST_GLIBC
    for name, wanted in locked():
        distribution = _installed(name, wanted)
        glibc = max(glibc, _glibc(distribution))
        for path, data in contents(distribution):
            tree.put(f"{HOME}/{path}", data)
    for path, target in LINKS.items():
        tree.link(f"{HOME}/{path}", target)
    for program in ("instar-server", "instarctl"):
        tree.put_own(program, f"usr/bin/{program}", 0o755)
    tree.put_own("instar-server.service", "usr/lib/systemd/system/instar-server.service")
    major, minor = sys.version_info[:2]  # compiled parts are for one minor version
    python = f"python3 (>= {major}.{minor}), python3 (<< {major}.{minor + 1})"
    return tree.build(out, version, architecture(), {"python": python, "libc": f"2.{glibc}"})


def locked(lock: Path = LOCK) -> Iterator[tuple[str, str]]:
    """Name and version of each package in the lock that this machine would install."""
    for name, version, marker in LOCKED.findall(lock.read_text()):
        if name not in NOT_NEEDED and "win32" not in marker:
            yield name, version


def _installed(name: str, wanted: str) -> importlib.metadata.Distribution:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise InputError("package-missing", f"cannot pack {name}: it is not installed here") from None
    if distribution.version != wanted:
        text = f"cannot pack {name}: expected version {wanted}, got {distribution.version}; run make setup"
        raise InputError("package-missing", text)
    return distribution


def contents(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of each file that the wheel brought. Raises InputError `altered-package`."""
    for file in distribution.files or []:
        path = file.as_posix()
        if path.startswith("../") or "__pycache__" in file.parts or file.name in OF_INSTALLERS:
            continue
        if path in LINKS:
            continue
        data = Path(str(file.locate())).read_bytes()
        if file.hash is None or file.hash.mode != "sha256" or file.hash.value != _hash(data):
            raise InputError("altered-package", f"cannot pack {path}: it is not what its wheel brought")
        yield path, data


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _glibc(distribution: importlib.metadata.Distribution) -> int:
    """The minor version of glibc 2 that the wheel needs; 0 for pure Python."""
    found = [int(number) for number in GLIBC.findall(distribution.read_text("WHEEL") or "")]
    return min(found, default=0)  # one wheel may say several: it meets the oldest


def _ours(package: str, folder: Path, version: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        foreign = package == "instar" and len(inside.parts) > 1 and inside.parts[0] not in SHARED
        if path.is_file() and "__pycache__" not in path.parts and not foreign:
            yield f"{package}/{inside.as_posix()}", path.read_bytes()
    if package == "instar":
        yield "instar/version.py", version_file(version, None)
    else:
        start = (folder / "__init__.py").read_text()
        yield f"{package}/__init__.py", VERSION.sub(f'VERSION = "{version}"', start).encode()


def architecture() -> str:
    """Debian's name for this machine's. Raises MachineError `no-package`."""
    words = ["dpkg", "--print-architecture"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30.0, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineError("no-package", f"cannot build a Debian package: dpkg: {error}") from None
    return done.stdout.strip()
