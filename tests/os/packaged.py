"""A node in a container that was installed from the Debian package."""

from __future__ import annotations

import shutil
from pathlib import Path

from instar_lab.deb import node_package
from tests.os.node import PROGRAM, OsNode

PACKAGE_UNITS = "/usr/lib/systemd/system"
WANTS = "/etc/systemd/system"


class PackagedNode(OsNode):
    """`instar` is /usr/bin/instar, and the units are the package's."""

    def install_package(self, version: str) -> str:
        """Install or upgrade with dpkg; what that printed."""
        return self.dpkg("-i", self.package(version))

    def package(self, version: str) -> Path:
        """The package of that program; built when it is first asked for."""
        path = self.container.folder / "packages" / f"instar_{version}_all.deb"
        return path if path.exists() else node_package(self.programs[version], path.parent)

    def dpkg(self, verb: str, package: Path | str) -> str:
        if isinstance(package, Path):
            inside = self.container.root / "root" / package.name
            shutil.copyfile(package, inside)
            package = f"/root/{package.name}"
        return self.container.do("dpkg", verb, package)

    def install(self, version: str, *options: str) -> str:
        """Install the package, and enrol with what the server hands out."""
        self.install_package(version)
        return self.enrol(version, *options)

    def enrol(self, version: str, *options: str) -> str:
        self.hand_out(version)
        return self.cli("install", "--embed", PROGRAM, "--api", self.api, *options)

    def cli(self, *words: str) -> str:
        return self.container.do("instar", *words)

    def owned(self) -> dict[str, str]:
        """What the package owns, with the checksum of each file now."""
        paths = self.container.do("dpkg", "-L", "instar").split()
        files = [path for path in paths if not (self.container.root / path.lstrip("/")).is_dir()]
        sums = self.container.do("sha256sum", *files).splitlines()
        return {path: digest for digest, path in (line.split(maxsplit=1) for line in sums)}
