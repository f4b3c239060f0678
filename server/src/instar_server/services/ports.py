"""What services need from outside: the time, chance and the signed repository. `main` hands in the real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from instar_server.trust.records import TargetRecord
from instar_server.trust.repository import Repository

Now = Callable[[], float]  # unix time
Chance = Callable[[int], str]  # so many random bytes, in hexadecimal


def moment(now: float) -> datetime:
    """Unix time as the repository wants it."""
    return datetime.fromtimestamp(now, UTC)


@dataclass(frozen=True, slots=True)
class NodeRelease:
    """A published release of the node program."""

    version: str
    target: str  # TUF target path
    digest: str  # program digest, SHA-384
    length: int
    sha256: str
    custom: dict[str, Any]


class Releases:
    """The published node programs, read from the signed targets metadata, newest metadata first."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def all(self) -> list[NodeRelease]:
        found = (_node_release(record) for record in self._repository.targets())
        return [release for release in found if release is not None]

    def by_version(self, version: str) -> NodeRelease | None:
        return next((release for release in self.all() if release.version == version), None)

    def by_program(self, version: str, digest: str) -> NodeRelease | None:
        """The release with that version and program digest, as signed."""
        return next((r for r in self.all() if r.version == version and r.digest == digest), None)


def _node_release(record: TargetRecord) -> NodeRelease | None:
    custom = record.custom
    version, digest = custom.get("version"), custom.get("program_digest")
    if custom.get("kind") != "node" or not isinstance(version, str) or not isinstance(digest, str):
        return None
    return NodeRelease(version, record.path, digest, record.length, record.sha256, custom)
