"""What the repository tells its callers: plain values, ready for JSON by `dataclasses.asdict`."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from securesystemslib.signer import Signer


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored file. `sha256` is lower-case hexadecimal, `length` in bytes."""

    sha256: str
    length: int


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """A target of the current, signed targets metadata. `custom` is what its signers said about it."""

    path: str
    length: int
    sha256: str
    custom: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Served:
    """The metadata of one moment: every root from the oldest on, timestamp, snapshot, targets, as (name, bytes),
    and the targets that they list. Nothing before the first publication."""

    files: list[tuple[str, bytes]]
    targets: list[TargetRecord]


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """Version and expiry (unix time) of one role; `threshold` of `keys` signatures are needed."""

    role: str
    version: int
    expires: int
    expired: bool
    threshold: int
    keys: int


@dataclass(frozen=True, slots=True)
class Published:
    """The versions that are served once a publish call has returned."""

    root: int
    targets: int
    snapshot: int
    timestamp: int


@dataclass(frozen=True, slots=True)
class OnlineSigners:
    """The keys that the server itself holds. Several per role only while keys are being changed."""

    snapshot: tuple[Signer, ...]
    timestamp: tuple[Signer, ...]


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long online metadata is good; it is signed anew when less than half is left."""

    snapshot: timedelta = timedelta(days=7)
    timestamp: timedelta = timedelta(days=1)
