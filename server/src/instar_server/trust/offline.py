"""What key holders do away from the server: make, change and sign root and targets metadata.

Pure: bytes and keys in, bytes out. A signature can also be made elsewhere: sign the bytes of
`payload` with any ed25519 program or token, and hand the result to `attach`, which verifies it first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signature, Signer
from tuf.api.metadata import Metadata, Root, TargetFile, Targets

from instar.core.errors import InputError, TrustError
from instar.trust.paths import check_path
from instar_server.trust import rules

Signable = Metadata[Root] | Metadata[Targets]


@dataclass(frozen=True, slots=True)
class RoleKeys:
    """The public keys of a role and how many of them must sign."""

    keys: Sequence[Key]
    threshold: int


@dataclass(frozen=True, slots=True)
class Signed:
    """What `state` says of one document: who signed and how many signatures are still missing."""

    role: str
    version: int
    expires: int
    threshold: int
    signed: list[str]
    missing: int


def first_root(roles: Mapping[str, RoleKeys], expires: datetime) -> bytes:
    """Unsigned root metadata, version 1. `roles` names root, targets, snapshot and timestamp."""
    root = Root(version=1, expires=expires, consistent_snapshot=True)
    _set_roles(root, roles)
    return Metadata(root).to_bytes()


def next_root(current: bytes, roles: Mapping[str, RoleKeys], expires: datetime) -> bytes:
    """Unsigned root metadata one version on. Roles that `roles` leaves out keep their keys.

    It must be signed by the threshold of `current` and by its own.
    """
    root = _root(current)
    root.version += 1
    root.expires = expires
    _set_roles(root, roles)
    return Metadata(root).to_bytes()


def replace_key(current: bytes, role: str, old: str, new: Key, expires: datetime) -> bytes:
    """Unsigned next root in which `new` stands in for the key with the id (or its start) `old`.

    Raises InputError `no-such-key`, `ambiguous-key`, `same-key-twice`.
    """
    root = _root(current)
    keyid = find_key(root, role, old)
    if new.keyid in root.roles[role].keyids:
        raise InputError("same-key-twice", f"cannot replace the key: {role} lists {new.keyid[:8]} already")
    keys = [new if held == keyid else root.keys[held] for held in root.roles[role].keyids]
    return next_root(current, {role: RoleKeys(keys, root.roles[role].threshold)}, expires)


def first_targets(expires: datetime) -> bytes:
    """Unsigned targets metadata, version 1, without a target."""
    return Metadata(Targets(version=1, expires=expires)).to_bytes()


def add_target(
    current: bytes, path: str, length: int, sha256: str, custom: Mapping[str, Any], expires: datetime
) -> bytes:
    """Unsigned targets metadata one version on, with one target more.

    Raises InputError `target-exists` when the path has other content: a release never changes.
    """
    targets = rules.parse(current, Targets).signed
    check_path(path, "target")
    target = TargetFile(length, {"sha256": sha256}, path, {"custom": dict(custom)})
    present = targets.targets.get(path)
    if present is not None and present != target:
        raise InputError("target-exists", f"cannot add {path}: it has other content; make a new version")
    targets.targets[path] = target
    return _next_targets(targets, expires)


def remove_target(current: bytes, path: str, expires: datetime) -> bytes:
    """Unsigned targets metadata one version on, without `path`. Raises InputError `no-such-target`."""
    targets = rules.parse(current, Targets).signed
    if targets.targets.pop(path, None) is None:
        raise InputError("no-such-target", f"cannot remove {path}: it is not listed")
    return _next_targets(targets, expires)


def sign(data: bytes, signer: Signer, roots: Sequence[bytes]) -> bytes:
    """`data` with the signature of `signer`, besides those that it has.

    `roots` are the roots that count: the current one, and for root metadata `data` itself is added.
    Raises InputError `not-a-key-of-role` when none of them lists the key for this role.
    """
    metadata = parse_signable(data)
    _check_listed(metadata, signer.public_key.keyid, roots)
    metadata.sign(signer, append=True)
    return metadata.to_bytes()


def payload(data: bytes) -> bytes:
    """The exact bytes to sign: canonical JSON of the document without its signatures."""
    return parse_signable(data).signed_bytes


def attach(data: bytes, keyid: str, signature: bytes, roots: Sequence[bytes]) -> bytes:
    """`data` with a signature (64 raw bytes) that was made elsewhere by the key `keyid` (or its start).

    Raises InputError `not-a-key-of-role`, TrustError `bad-signature`: nothing is attached unverified.
    """
    metadata = parse_signable(data)
    key = _check_listed(metadata, keyid, roots)
    made = Signature(key.keyid, signature.hex())
    try:
        key.verify_signature(made, metadata.signed_bytes)
    except UnverifiedSignatureError:
        raise TrustError(
            "bad-signature",
            f"cannot attach the signature: it is not one of key {key.keyid[:8]} over "
            f"{metadata.signed.type} version {metadata.signed.version}",
        ) from None
    metadata.signatures[key.keyid] = made
    return metadata.to_bytes()


def state(data: bytes, root: bytes) -> Signed:
    """Who has signed `data` so far, by the keys of `root`. Good signatures only."""
    metadata = parse_signable(data)
    signed = metadata.signed
    result = _root(root).get_verification_result(signed.type, metadata.signed_bytes, metadata.signatures)
    return Signed(
        signed.type,
        signed.version,
        int(signed.expires.timestamp()),
        result.threshold,
        sorted(result.signed),
        result.missing,
    )


def parse_signable(data: bytes) -> Signable:
    """Root or targets metadata. Raises InputError `bad-metadata`, `wrong-role`."""
    try:
        kind = json.loads(data)["signed"]["_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("bad-metadata", "cannot read metadata: expected signed TUF metadata") from error
    return rules.parse(data, Root) if kind == "root" else rules.parse(data, Targets)


def find_key(root: Root, role: str, prefix: str) -> str:
    """The id of the one key of `role` that starts with `prefix`."""
    found = [keyid for keyid in root.roles[role].keyids if keyid.startswith(prefix)]
    if len(found) != 1 or not prefix:
        held = ", ".join(keyid[:8] for keyid in root.roles[role].keyids)
        code = "ambiguous-key" if len(found) > 1 else "no-such-key"
        raise InputError(code, f"cannot find the key {prefix!r} of {role}: expected one of {held}")
    return found[0]


def _root(data: bytes) -> Root:
    return rules.parse(data, Root).signed


def _next_targets(targets: Targets, expires: datetime) -> bytes:
    targets.version += 1
    targets.expires = expires
    return Metadata(targets).to_bytes()


def _set_roles(root: Root, roles: Mapping[str, RoleKeys]) -> None:
    for name, wanted in roles.items():
        if name not in rules.ROLES:
            raise InputError("wrong-role", f"cannot set the keys of {name!r}: expected one of {rules.ROLES}")
        for keyid in list(root.roles[name].keyids):
            root.revoke_key(keyid, name)
        for key in wanted.keys:
            root.add_key(key, name)
        root.roles[name].threshold = wanted.threshold
    rules.check_distinct_keys(root)


def _check_listed(metadata: Signable, keyid: str, roots: Sequence[bytes]) -> Key:
    """The key `keyid` (or its start), which one of `roots` must list for the role of `metadata`."""
    known = [_root(data) for data in roots]
    if isinstance(metadata.signed, Root):
        known.append(metadata.signed)
    role = metadata.signed.type
    for root in known:
        for held in root.roles[role].keyids:
            if keyid and held.startswith(keyid):
                return root.keys[held]
    raise InputError(
        "not-a-key-of-role", f"cannot sign {role} metadata with {keyid[:8]!r}: no root lists this key for it"
    )
