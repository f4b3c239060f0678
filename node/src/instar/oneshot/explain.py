"""What a failed TUF refresh means, in a stable code and a sentence that names role, version, expected, got.

python-tuf says it in prose and a handful of exception classes; this looks at the same documents again.
Codes: bad-pinned-root · expired-<role> · stale-mirror · mixed-snapshot · rolled-back · wrong-root-version ·
wrong-threshold · bad-signature · altered-<role> · no-metadata. Only the words are decided here: whatever
comes in, the verification has failed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Root
from tuf.api.serialization import DeserializationError
from tuf.ngclient import UpdaterConfig

from instar.core.errors import InstarError, ServerUnreachable, TrustError
from instar.oneshot.cache import document, version_of

LIMITS = {"root": UpdaterConfig.root_max_length, "timestamp": UpdaterConfig.timestamp_max_length}
ROLES = ("root", "timestamp", "snapshot", "targets")


@dataclass(frozen=True, slots=True)
class Scene:
    """What lay there when it failed. `role` was fetched last; `fetched` and `trusted` map roles to bytes."""

    role: str
    fetched: Mapping[str, bytes]
    trusted: Mapping[str, bytes]
    now: datetime

    def newest(self, role: str) -> dict[str, Any]:
        """The document with the higher version, fetched or trusted."""
        new, old = document(self.fetched.get(role)), document(self.trusted.get(role))
        return new if new.get("version", 0) >= old.get("version", 0) and new else old

    def got(self) -> int | None:
        return version_of(self.fetched.get(self.role))

    def held(self) -> int | None:
        return version_of(self.trusted.get(self.role))


def explain(error: Exception, scene: Scene) -> InstarError:
    """The error to report for `error`, which python-tuf raised."""
    for kind, words in WORDS:
        if isinstance(error, kind):
            return words(error, scene)
    return TrustError(f"altered-{scene.role}", f"cannot trust {scene.role} metadata: {error}")


def _absent(error: Exception, scene: Scene) -> InstarError:
    if scene.role == "timestamp":
        return ServerUnreachable("no-metadata", "cannot update: the server has no timestamp.json yet")
    parent = "timestamp" if scene.role == "snapshot" else "snapshot"
    version = scene.newest(parent).get("version")
    return _stale(f"its {parent} version {version} names {_named(scene)}, which it does not have")


def _stale(reason: str) -> TrustError:
    return TrustError(
        "stale-mirror",
        f"cannot update now: the server is a stale mirror: {reason}; waiting for it to catch up",
    )


def _named(scene: Scene) -> str:
    """'snapshot version 5': what the parent document says should be there."""
    return f"{scene.role} version {_meta(scene).get('version')}"


def _meta(scene: Scene) -> dict[str, Any]:
    parent = "timestamp" if scene.role == "snapshot" else "snapshot"
    meta = scene.newest(parent).get("meta")
    entry = meta.get(f"{scene.role}.json") if isinstance(meta, dict) else None
    return entry if isinstance(entry, dict) else {}


def _expired(error: Exception, scene: Scene) -> InstarError:
    clock = f"{scene.now:%Y-%m-%dT%H:%M:%SZ}"
    for role in ROLES:
        signed = scene.newest(role)
        expires = str(signed.get("expires", ""))
        if signed and expires <= clock:
            return TrustError(
                f"expired-{role}",
                f"cannot update: {role} metadata version {signed.get('version')} expired at {expires}, "
                f"and this machine's clock says {clock}; what runs goes on running",
            )
    return TrustError(f"expired-{scene.role}", f"cannot update: {error}")


def _too_long(error: Exception, scene: Scene) -> InstarError:
    if scene.role in ("snapshot", "targets"):
        return _altered(error, scene)
    limit = LIMITS[scene.role]
    return TrustError(
        f"altered-{scene.role}",
        f"cannot read {scene.role} metadata: expected at most {limit} bytes, "
        f"got {len(scene.fetched[scene.role])}",
    )


def _unreadable(error: Exception, scene: Scene) -> InstarError:
    try:
        signatures = json.loads(scene.fetched.get(scene.role, b""))["signatures"]
        keyids = [signature["keyid"] for signature in signatures]
    except (ValueError, KeyError, TypeError, RecursionError):
        keyids = []
    if len(set(keyids)) != len(keyids):
        return TrustError(
            "bad-signature",
            f"cannot trust {scene.role} version {scene.got()}: expected one signature a key, got two",
        )
    cause = error.__cause__ or error
    return TrustError(f"altered-{scene.role}", f"cannot read {scene.role} metadata: {cause}")


def _unsigned(error: Exception, scene: Scene) -> InstarError:
    metadata = Metadata[Any].from_bytes(scene.fetched[scene.role])
    roots: list[tuple[str, Root]] = []
    if scene.trusted.get("root"):
        roots.append(("the trusted root", Metadata[Root].from_bytes(scene.trusted["root"]).signed))
    if isinstance(metadata.signed, Root):
        roots.append(("itself", metadata.signed))
    for name, root in roots:
        result = root.get_verification_result(scene.role, metadata.signed_bytes, metadata.signatures)
        if result.verified:
            continue
        bad = sum(1 for keyid in result.unsigned if keyid in metadata.signatures)
        enough = len(result.signed) + bad >= result.threshold
        return TrustError(
            "bad-signature" if enough else "wrong-threshold",
            f"cannot trust {scene.role} version {scene.got()}: expected {result.threshold} signatures by "
            f"keys that {name} (version {root.version}) lists, got {len(result.signed)} good and {bad} bad",
        )
    return TrustError("bad-signature", f"cannot trust {scene.role} metadata: {error}")


def _altered(error: Exception, scene: Scene) -> InstarError:
    meta, data = _meta(scene), scene.fetched.get(scene.role, b"")
    if scene.got() is not None and scene.got() != meta.get("version"):
        return _mixed(scene)
    hashes = meta.get("hashes")
    expected = hashes.get("sha256") if isinstance(hashes, dict) else "unknown"
    return TrustError(
        f"altered-{scene.role}",
        f"cannot trust {_named(scene)}: expected {meta.get('length')} bytes with sha256 {expected}, "
        f"got {len(data)} bytes with {hashlib.sha256(data).hexdigest()}",
    )


def _mixed(scene: Scene) -> TrustError:
    return TrustError(
        "mixed-snapshot",
        f"cannot trust {scene.role} metadata: expected version {_meta(scene).get('version')} as the "
        f"{'timestamp' if scene.role == 'snapshot' else 'snapshot'} says, got version {scene.got()}",
    )


def _version(error: Exception, scene: Scene) -> InstarError:
    got, held = scene.got(), scene.held()
    if scene.role == "root":
        return TrustError("wrong-root-version", f"cannot trust root metadata: {error}")
    if scene.role == "timestamp" and got is not None and held is not None and got < held:
        return _stale(f"expected timestamp version {held} or later, got {got}")
    if scene.role in ("snapshot", "targets") and got != _meta(scene).get("version"):
        return _mixed(scene)
    return TrustError(
        "rolled-back",
        f"cannot trust {scene.role} version {got}: version {held} was seen before: {error}",
    )


def _other(error: Exception, scene: Scene) -> InstarError:
    if "missing info" in str(error):
        return TrustError("rolled-back", f"cannot trust {scene.role} version {scene.got()}: {error}")
    return TrustError(f"altered-{scene.role}", f"cannot trust {scene.role} metadata: {error}")


# The first class that fits decides, so the more special one stands first.
WORDS: tuple[tuple[type[Exception], Callable[[Exception, Scene], InstarError]], ...] = (
    (DownloadHTTPError, _absent),
    (DownloadLengthMismatchError, _too_long),
    (ExpiredMetadataError, _expired),
    (DeserializationError, _unreadable),
    (UnsignedMetadataError, _unsigned),
    (LengthOrHashMismatchError, _altered),
    (BadVersionNumberError, _version),
    (RepositoryError, _other),
)
