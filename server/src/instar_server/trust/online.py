"""The two roles that the server signs by itself, snapshot and timestamp: with which keys, for how long, and when anew.

No I/O. Time is an argument.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from instar.core.errors import InputError, TrustError
from instar_server.trust import rules
from instar_server.trust.records import Lifetimes, OnlineSigners


class Signed(NamedTuple):
    """What was signed last. The bytes are those that are served."""

    snapshot: Metadata[Snapshot]
    snapshot_bytes: bytes
    timestamp: Metadata[Timestamp]
    timestamp_bytes: bytes


class OnlineRoles:
    """Immutable."""

    def __init__(self, signers: OnlineSigners, lifetimes: Lifetimes) -> None:
        self._signers, self._lifetimes = signers, lifetimes

    def joined_by(self, signers: OnlineSigners | None) -> OnlineRoles:
        """With these keys too; they count under a root that lists them."""
        if signers is None:
            return self
        old = self._signers
        both = OnlineSigners(_join(old.snapshot, signers.snapshot), _join(old.timestamp, signers.timestamp))
        return OnlineRoles(both, self._lifetimes)

    def check(self, root: Root) -> None:
        """Raise InputError `wrong-online-keys` unless these keys can sign snapshot and timestamp under `root`."""
        for role, signers in (("snapshot", self._signers.snapshot), ("timestamp", self._signers.timestamp)):
            lack = rules.signers_missing(root, role, {signer.public_key.keyid for signer in signers})
            if lack:
                raise InputError("wrong-online-keys", f"cannot sign {role} metadata: {lack}")

    def sign(
        self,
        targets: Metadata[Targets],
        data: bytes,
        before: Signed | None,
        roots: Sequence[Root],
        now: datetime,
    ) -> Signed:
        """A snapshot of `targets`, whose bytes are `data`, and a timestamp, each one version after `before`.

        Both are good under every one of `roots`. Raises TrustError when these keys do not suffice for that.
        """
        snapshot = Metadata(
            Snapshot(
                version=before.snapshot.signed.version + 1 if before else 1,
                expires=now + self._lifetimes.snapshot,
                meta={"targets.json": _meta_file(targets.signed.version, data)},
            )
        )
        snapshot_bytes = _sign_under(snapshot, self._signers.snapshot, roots)
        timestamp = Metadata(
            Timestamp(
                version=before.timestamp.signed.version + 1 if before else 1,
                expires=now + self._lifetimes.timestamp,
                snapshot_meta=_meta_file(snapshot.signed.version, snapshot_bytes),
            )
        )
        timestamp_bytes = _sign_under(timestamp, self._signers.timestamp, roots)
        return Signed(snapshot, snapshot_bytes, timestamp, timestamp_bytes)

    def due(self, signed: Signed | None, root: Root, now: datetime) -> bool:
        """Whether what was signed is over half its life, or not signed by the keys of `root`."""
        if signed is None or not verifies_under(root, signed):
            return True
        lives = self._lifetimes
        return (
            signed.snapshot.signed.expires - now < lives.snapshot / 2
            or signed.timestamp.signed.expires - now < lives.timestamp / 2
        )

    def sign_config(self, root: Root, data: bytes) -> bytes:
        """The ed25519 signature (64 bytes) of a key of the timestamp role of `root` over `data`.

        Raises TrustError `no-timestamp-key`.
        """
        keyids = root.roles["timestamp"].keyids
        for signer in self._signers.timestamp:
            if signer.public_key.keyid in keyids:
                return bytes.fromhex(signer.sign(data).signature)
        raise TrustError("no-timestamp-key", "cannot sign a configuration: no timestamp key at hand")


def verifies_under(root: Root, signed: Signed) -> bool:
    """Whether both are signed by the thresholds of `root`."""
    both: tuple[Metadata[Any], ...] = (signed.snapshot, signed.timestamp)
    return all(
        root.get_verification_result(each.signed.type, each.signed_bytes, each.signatures).verified
        for each in both
    )


def _sign_under(metadata: Metadata[Any], signers: Sequence[Signer], roots: Sequence[Root]) -> bytes:
    """Sign with every key that one of `roots` lists for the role; it must then verify under all of them."""
    role = metadata.signed.type
    useful = {keyid for root in roots for keyid in root.roles[role].keyids}
    for signer in signers:
        if signer.public_key.keyid in useful:
            metadata.sign(signer, append=True)
    for root in roots:
        rules.check_signatures(metadata, root, f"root version {root.version}")
    return metadata.to_bytes()


def _meta_file(version: int, data: bytes) -> MetaFile:
    return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


def _join(*groups: tuple[Signer, ...]) -> tuple[Signer, ...]:
    """Each key once."""
    return tuple({signer.public_key.keyid: signer for group in groups for signer in group}.values())
