"""What services need from outside: the time, chance and the signed repository. `main` hands in the real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from instar.core.errors import InstarError
from instar.core.releases import version_key
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


@dataclass(frozen=True, slots=True)
class RecoveryCore:
    """A published recovery core: the program that installs a release on a node whose own update code is broken."""

    version: str
    target: str  # TUF target path
    digest: str  # program digest, SHA-384
    length: int
    sha256: str
    custom: dict[str, Any]


class Recoveries:
    """The published recovery cores, read from the signed targets metadata."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def all(self) -> list[RecoveryCore]:
        """Newest version first."""
        found = (_recovery_core(record) for record in self._repository.targets())
        cores = [core for core in found if core is not None]
        return sorted(cores, key=lambda core: version_key(core.version), reverse=True)

    def newest(self) -> RecoveryCore | None:
        return next(iter(self.all()), None)

    def by_version(self, version: str) -> RecoveryCore | None:
        return next((core for core in self.all() if core.version == version), None)


@dataclass(frozen=True, slots=True)
class ModuleRelease:
    """A published version of a module. `runs`: python, native or wasm; `mode`: oneshot or service."""

    name: str
    version: str
    target: str  # TUF target path
    digest: str  # module digest, SHA-384
    runs: str
    mode: str
    length: int
    sha256: str
    custom: dict[str, Any]


class Modules:
    """The published modules, read from the signed targets metadata."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def all(self) -> list[ModuleRelease]:
        """By name, newest version first."""
        found = (_module_release(record) for record in self._repository.targets())
        modules = [module for module in found if module is not None]
        modules.sort(key=lambda module: version_key(module.version), reverse=True)
        modules.sort(key=lambda module: module.name)
        return modules

    def find(self, name: str, version: str = "") -> ModuleRelease | None:
        """That version, or the newest one."""
        mine = (each for each in self.all() if each.name == name and version in ("", each.version))
        return next(mine, None)


def _module_release(record: TargetRecord) -> ModuleRelease | None:
    custom = record.custom
    words = [custom.get(name) for name in ("name", "version", "digest", "runs", "mode")]
    if custom.get("kind") != "module" or not all(isinstance(word, str) for word in words):
        return None
    name, version, digest, runs, mode = map(str, words)
    try:
        version_key(version)
    except InstarError:
        return None
    return ModuleRelease(name, version, record.path, digest, runs, mode, record.length, record.sha256, custom)


def _recovery_core(record: TargetRecord) -> RecoveryCore | None:
    custom = record.custom
    version, digest = custom.get("version"), custom.get("digest")
    if custom.get("kind") != "recovery" or not isinstance(version, str) or not isinstance(digest, str):
        return None
    try:
        version_key(version)
    except InstarError:
        return None
    return RecoveryCore(version, record.path, digest, record.length, record.sha256, custom)


def _node_release(record: TargetRecord) -> NodeRelease | None:
    custom = record.custom
    version, digest = custom.get("version"), custom.get("program_digest")
    if custom.get("kind") != "node" or not isinstance(version, str) or not isinstance(digest, str):
        return None
    return NodeRelease(version, record.path, digest, record.length, record.sha256, custom)
