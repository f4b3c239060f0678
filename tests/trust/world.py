"""A whole trust world in a temporary folder: keys, a real repository, a node's trust folder.

The node fetches from the repository's own calls, in memory. `World.tamper` holds answers that an
attacker, or a broken mirror, gives instead.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner

from instar.core.errors import ServerRefused, ServerUnreachable
from instar.oneshot.metadata import VerifiedTarget, verify_target
from instar_server.trust import offline
from instar_server.trust.files import DISK, Disk
from instar_server.trust.offline import RoleKeys
from instar_server.trust.pack import Release, pack_release
from instar_server.trust.records import OnlineSigners
from instar_server.trust.repository import Repository

CA = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
PATH = "node/instar-1.1.0.tar.gz"


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def days(count: float) -> datetime:
    return now() + timedelta(days=count)


def signer() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


def program(text: str = "print('hello')") -> bytes:
    """A small zipapp."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py"), text)
    return b"#!/usr/bin/env python3\n" + file.getvalue()


@dataclass
class Keys:
    root: list[CryptoSigner]
    targets: list[CryptoSigner]
    snapshot: CryptoSigner
    timestamp: CryptoSigner

    @classmethod
    def make(cls) -> Keys:
        return cls([signer() for _ in range(3)], [signer() for _ in range(3)], signer(), signer())

    @property
    def online(self) -> OnlineSigners:
        return OnlineSigners((self.snapshot,), (self.timestamp,))

    def roles(self) -> dict[str, RoleKeys]:
        return {
            "root": RoleKeys([key.public_key for key in self.root], 2),
            "targets": RoleKeys([key.public_key for key in self.targets], 2),
            "snapshot": RoleKeys([self.snapshot.public_key], 1),
            "timestamp": RoleKeys([self.timestamp.public_key], 1),
        }


@dataclass
class World:
    folder: Path
    keys: Keys = field(default_factory=Keys.make)
    tamper: dict[str, bytes | None] = field(default_factory=dict)
    unreachable: bool = False
    asked: list[str] = field(default_factory=list)
    root_expires: datetime = field(default_factory=lambda: days(365))
    repository: Repository = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.sign_root(offline.first_root(self.keys.roles(), self.root_expires))
        self.targets_bytes = offline.first_targets(days(90))
        self.repository = self.create()
        self.trust = self.folder / "state" / "trust"
        self.trust.mkdir(parents=True)
        (self.trust / "pinned-root.json").write_bytes(self.root)

    def create(self, disk: Disk = DISK) -> Repository:
        return Repository.create(
            self.folder / "repository", self.root, self.keys.online, now() - timedelta(days=400), disk=disk
        )

    def open(self, disk: Disk = DISK) -> Repository:
        return Repository.open(self.folder / "repository", self.keys.online, now(), disk=disk)

    # ---- the operator's side

    def sign_root(self, data: bytes, *signers: CryptoSigner, old: bytes | None = None) -> bytes:
        for key in signers or tuple(self.keys.root[:2]):
            data = offline.sign(data, key, [old] if old else [])
        return data

    def sign_targets(self, data: bytes, *signers: CryptoSigner) -> bytes:
        for key in signers or tuple(self.keys.targets[:2]):
            data = offline.sign(data, key, [self.repository.root()])
        return data

    def add_blob(self, data: bytes) -> str:
        temporary = self.repository.blobs.staging / "upload.part"
        temporary.write_bytes(data)
        return self.repository.blobs.add(temporary).sha256

    def with_release(self, release: Release, expires: datetime | None = None) -> bytes:
        """Unsigned targets metadata with one release more; its blob is uploaded."""
        self.add_blob(release.archive)
        return offline.add_target(
            self.targets_bytes,
            release.path,
            len(release.archive),
            release.sha256,
            release.custom,
            expires or days(90),
        )

    def publish(self, version: str, text: str = "print('hello')") -> Release:
        release = pack_release(program(text), version)
        data = self.sign_targets(self.with_release(release))
        self.repository.publish_targets(data, now())
        self.targets_bytes = data
        return release

    # ---- the server's side, and who stands between

    def fetch(self, path: str) -> bytes:
        self.asked.append(path)
        if self.unreachable:
            raise ServerUnreachable("server-unreachable", "cannot reach https://server:1: refused")
        name = path.removeprefix("metadata/")
        data = self.tamper[name] if name in self.tamper else self.repository.metadata(name)
        if data is None:
            raise ServerRefused("not-found", f"{path}: HTTP status 404")
        return data

    def served(self) -> dict[str, bytes]:
        """All metadata as it is served now, by name."""
        names = {path.name for path in (self.folder / "repository" / "metadata").glob("*.json")}
        return {name: data for name in names if (data := self.repository.metadata(name)) is not None}

    def current(self, role: str) -> tuple[str, bytes]:
        """Name and bytes of the role's file that is served now."""
        row = next(row for row in self.repository.status(now()) if row.role == role)
        name = "timestamp.json" if role == "timestamp" else f"{row.version}.{role}.json"
        data = self.repository.metadata(name)
        assert data is not None
        return name, data

    # ---- the node's side

    def verify(self, path: str = PATH) -> VerifiedTarget:
        return verify_target(self.trust, path, self.fetch, now())

    def trusted(self) -> dict[str, bytes]:
        """The node's trusted metadata on disk."""
        folder = self.trust / "tuf"
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*.json"))
            if path.is_file()
        }


def signed_part(data: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(data)["signed"]
    return value


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
