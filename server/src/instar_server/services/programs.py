"""The one file that installs a node: a published program with this operator's configuration in it."""

from __future__ import annotations

import asyncio
import tarfile
from pathlib import Path

from instar.core.errors import MachineError
from instar.core.releases import version_key
from instar_server.domain.errors import NotFound
from instar_server.domain.tokens import EnrolmentToken
from instar_server.domain.wanted import effective
from instar_server.services.ports import NodeRelease, Releases
from instar_server.services.wishes import Wishes
from instar_server.trust.repository import Repository

MEMBER = "instar.pyz"
MAX_PROGRAM = 64 * 1024 * 1024  # bytes


class Programs:
    """`server` is the address that the program gets: the gateway as nodes reach it."""

    def __init__(self, repository: Repository, releases: Releases, wishes: Wishes, ca: str) -> None:
        self._repository, self._releases, self._wishes, self._ca = repository, releases, wishes, ca
        self.server = ""

    async def make(
        self, token: EnrolmentToken, secret: str, version: str | None
    ) -> tuple[NodeRelease, bytes]:
        """The program for a token's group: `version`, else what is wanted there, else the newest.

        Raises NotFound `no-release`.
        """
        release = await self._choose(token.group, version)
        program = await asyncio.to_thread(self._program, release)
        whole = await asyncio.to_thread(
            lambda: self._repository.embed(
                program, server=self.server, ca=self._ca, token=secret, group=token.group
            )
        )
        return release, whole

    async def _choose(self, group: str, version: str | None) -> NodeRelease:
        releases = self._releases.all()
        if version is None:
            wished = effective(await self._wishes.all(), "", group).get("agent")
            version = wished.version if wished else None
        if version is None and releases:
            return max(releases, key=lambda release: version_key(release.version))
        found = next((release for release in releases if release.version == version), None)
        if found is None:
            named = f"release {version[:64]}" if version else "any release"
            raise NotFound("no-release", f"cannot hand out {named}: it is not published")
        return found

    def _program(self, release: NodeRelease) -> bytes:
        folder, _, name = release.target.rpartition("/")
        path = self._repository.target_file(
            f"{folder}/{release.sha256}.{name}" if folder else f"{release.sha256}.{name}"
        )
        if path is None:
            raise MachineError(
                "blob-missing", f"cannot hand out {release.version}: its file is not in the repository"
            )
        return _member(path)


def _member(path: Path) -> bytes:
    """The program inside a signed release archive."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            member = archive.getmember(MEMBER)
            file = archive.extractfile(member)
            if file is None or member.size > MAX_PROGRAM:
                raise MachineError("bad-release", f"cannot read {MEMBER} in {path.name}")
            return file.read()
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise MachineError("bad-release", f"cannot read {MEMBER} in {path.name}: {error}") from error
