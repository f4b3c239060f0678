"""A package's files as they are collected, and the archive that dpkg-deb makes of them."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from email.utils import formatdate
from pathlib import Path

from instar.core.errors import MachineError

ROOT = Path(__file__).resolve().parents[4]
PACKAGING = ROOT / "packaging"
MAINTAINER = os.environ.get("DEB_MAINTAINER") or "Instar <instar@example.com>"
MADE = 1767225600  # unix time of every file unless SOURCE_DATE_EPOCH says otherwise: 2026-01-01
SCRIPTS = ("preinst", "postinst", "prerm", "postrm")
BUILD_S = 600.0
DOCUMENTS = ("install.md", "configuration.md", "operating.md", "releases.md")


class Tree:
    """The files of one package; `packaging/<folder>` holds what is written by hand."""

    def __init__(self, name: str, folder: str) -> None:
        self.name, self.source = name, PACKAGING / folder
        self._files: dict[str, tuple[bytes, int]] = {}
        self._links: dict[str, str] = {}

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """`path` has no leading slash."""
        self._files[path] = (data, mode)

    def link(self, path: str, target: str) -> None:
        self._links[path] = target

    def put_own(self, name: str, path: str, mode: int = 0o644) -> None:
        """A file of packaging/."""
        self.put(path, (self.source / name).read_bytes(), mode)

    def put_documents(self, version: str, epoch: int) -> None:
        """What Debian wants beside any package, and what its user wants to read."""
        folder = f"usr/share/doc/{self.name}"
        entry = (
            f"{self.name} ({version}) unstable; urgency=medium\n\n  * See CHANGELOG.md.gz.\n\n"
            f" -- {MAINTAINER}  {formatdate(epoch)}\n"
        )
        self.put(f"{folder}/changelog.gz", squeezed(entry.encode()))
        self.put(f"{folder}/CHANGELOG.md.gz", squeezed((ROOT / "CHANGELOG.md").read_bytes()))
        self.put_own("copyright", f"{folder}/copyright")
        for name in DOCUMENTS:
            self.put(f"{folder}/{name}.gz", squeezed((ROOT / "docs" / name).read_bytes()))
        self.put_own("lintian-overrides", f"usr/share/lintian/overrides/{self.name}")

    def build(self, out: Path, version: str, architecture: str, words: Mapping[str, str]) -> Path:
        """Write the package below `out`. `words` fill the control file. Raises MachineError `no-package`."""
        epoch = source_date()
        self.put_documents(version, epoch)
        path = out / f"{self.name}_{version}_{architecture}.deb"
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="instar-deb-") as scratch:
            top = Path(scratch) / "tree"
            self._write(top)
            self._write_control(top, {"version": version, "architecture": architecture, **words})
            for each in sorted(top.rglob("*"), reverse=True):
                os.utime(each, (epoch, epoch), follow_symlinks=False)
            os.utime(top, (epoch, epoch))
            _dpkg_deb(top, path, epoch)
        return path

    def _write(self, top: Path) -> None:
        for path, (data, mode) in sorted(self._files.items()):
            target = top / path
            _make_folder(top, target.parent)
            target.write_bytes(data)
            target.chmod(mode)
        for path, to in self._links.items():
            _make_folder(top, (top / path).parent)
            (top / path).symlink_to(to)

    def _write_control(self, top: Path, words: Mapping[str, str]) -> None:
        folder = top / "DEBIAN"
        _make_folder(top, folder)
        size = sum(len(data) // 1024 + 1 for data, _ in self._files.values())
        control = (self.source / "control").read_text()
        sums = "".join(
            f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}  {path}\n"
            for path, (data, _) in sorted(self._files.items())
        )
        filled = control.format(maintainer=MAINTAINER, size=size, **words)
        for name, text in (("control", filled), ("md5sums", sums)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o644)
        for name in SCRIPTS:
            if (self.source / name).exists():
                shutil.copyfile(self.source / name, folder / name)
                (folder / name).chmod(0o755)


def source_date() -> int:
    """The time that every file gets, in unix time."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or MADE)


def squeezed(data: bytes) -> bytes:
    return gzip.compress(data, 9, mtime=0)


def _make_folder(top: Path, folder: Path) -> None:
    """With the mode that a package's folders have, whatever the umask is."""
    if folder.is_dir():
        return
    if folder != top:
        _make_folder(top, folder.parent)
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)


def _dpkg_deb(top: Path, path: Path, epoch: int) -> None:
    # One thread: the blocks that xz makes of a file hang on how many there are.
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "DPKG_DEB_THREADS_MAX": "1"}
    words = ["dpkg-deb", "--root-owner-group", "-Zxz", "-z2", "--build", str(top), str(path)]
    try:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=BUILD_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("no-package", f"cannot build {path.name}: dpkg-deb: {error}") from None
    if done.returncode:
        text = f"cannot build {path.name}: dpkg-deb ended with {done.returncode}: {done.stderr.strip()}"
        raise MachineError("no-package", text)
