"""What may be published: pure checks of signed metadata against the metadata that is served now.

Bytes in, a parsed and verified object out, or an error that names the role, the version,
and what was expected and got. No clock: `now` is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeVar

from securesystemslib.signer import Signature
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from instar.core.errors import InputError, TrustError
from instar.trust.paths import check_path

MAX_METADATA = 5_000_000  # bytes; the node's TUF client takes no larger targets metadata
MAX_ROOT = 512_000
ROLES = ("root", "targets", "snapshot", "timestamp")
T = TypeVar("T", Root, Targets, Snapshot, Timestamp)


def parse(data: bytes, kind: type[T]) -> Metadata[T]:
    """The metadata in `data`, which must be of the role `kind`. Nothing is verified yet."""
    role = kind.type
    limit = MAX_ROOT if role == "root" else MAX_METADATA
    if len(data) > limit:
        raise InputError("metadata-too-large", f"cannot read {role}: at most {limit} bytes, got {len(data)}")
    try:
        metadata = Metadata[T].from_bytes(data)
    except DeserializationError as error:
        cause = error.__cause__ or error
        raise InputError("bad-metadata", f"cannot read {role} metadata: {cause}") from error
    if not isinstance(metadata.signed, kind):
        got = metadata.signed.type
        raise InputError("wrong-role", f"cannot use this as {role} metadata: expected {role}, got {got}")
    return metadata


def check_signatures(metadata: Metadata[Any], root: Root, name: str) -> None:
    """Refuse `metadata` unless the threshold of its role in `root` has signed it."""
    signed = metadata.signed
    result = root.get_verification_result(signed.type, metadata.signed_bytes, metadata.signatures)
    if result.verified:
        return
    present = sum(1 for keyid in result.unsigned if keyid in metadata.signatures)
    code = "bad-signature" if present + len(result.signed) >= result.threshold else "wrong-threshold"
    raise TrustError(
        code,
        f"cannot accept {signed.type} version {signed.version}: expected {result.threshold} signatures by "
        f"keys that {name} lists for {signed.type}, got {len(result.signed)} good and {present} bad",
    )


def check_root(data: bytes, current: Root | None, now: datetime) -> Metadata[Root]:
    """The next root: version exactly one on, signed by the thresholds of both, or the first one."""
    metadata = parse(data, Root)
    root = metadata.signed
    if current is not None:
        if root.version != current.version + 1:
            raise InputError(
                "wrong-root-version",
                f"cannot publish root: expected version {current.version + 1}, got {root.version}",
            )
        check_signatures(metadata, current, f"root version {current.version}")
    check_signatures(metadata, root, "this root itself")
    if not root.consistent_snapshot:
        raise InputError("bad-root", "cannot publish root: expected consistent_snapshot true, got false")
    check_expiry(root, now)
    check_distinct_keys(root)
    return metadata


def check_distinct_keys(root: Root) -> None:
    """Refuse a role in which one key stands under two ids: it would count twice for the threshold."""
    for name, role in root.roles.items():
        seen: dict[str, str] = {}
        for keyid in role.keyids:
            public = str(root.keys[keyid].keyval.get("public")) if keyid in root.keys else keyid
            if public in seen:
                raise InputError(
                    "same-key-twice",
                    f"cannot use root: role {name} lists one key twice, as {seen[public][:8]}, {keyid[:8]}",
                )
            seen[public] = keyid
        if len(seen) < role.threshold:
            raise InputError(
                "threshold-too-high",
                f"cannot use root: role {name} wants {role.threshold} signatures of {len(seen)} keys",
            )


def check_targets(data: bytes, root: Root, current: Targets | None, now: datetime) -> Metadata[Targets]:
    """The next targets metadata: newer than the current one, signed by its threshold, not expired."""
    metadata = parse(data, Targets)
    targets = metadata.signed
    check_signatures(metadata, root, f"root version {root.version}")
    if current is not None and targets.version <= current.version:
        raise InputError(
            "old-targets",
            f"cannot publish targets: expected a version over {current.version}, got {targets.version}",
        )
    check_expiry(targets, now)
    if targets.delegations is not None:
        raise InputError("delegations", "cannot publish targets: delegations are not supported")
    for path, target in targets.targets.items():
        check_path(path, "target")
        sha256_of(path, target)
    return metadata


def sha256_of(path: str, target: TargetFile) -> str:
    """The SHA-256 that the signers gave for `path`; it names the blob, so it must be the only hash."""
    if list(target.hashes) != ["sha256"]:
        got = ", ".join(target.hashes) or "none"
        raise InputError("bad-hashes", f"cannot use target {path}: expected the hash sha256 alone, got {got}")
    return str(target.hashes["sha256"])


def check_expiry(signed: Signed, now: datetime) -> None:
    if signed.is_expired(now):
        raise TrustError(
            "expired",
            f"cannot publish {signed.type} version {signed.version}: it expired {signed.expires:%F %T} UTC",
        )


def signers_missing(root: Root, role: str, held: Mapping[str, Signature] | set[str]) -> str | None:
    """Why keys with the ids `held` cannot sign for `role` under `root`; None when they can."""
    wanted = root.roles[role]
    good = [keyid for keyid in wanted.keyids if keyid in held]
    if len(good) >= wanted.threshold:
        return None
    ids = ", ".join(keyid[:8] for keyid in wanted.keyids)
    return (
        f"expected {wanted.threshold} of the keys that root version {root.version} lists for {role} ({ids}), "
        f"got {len(good)}"
    )
