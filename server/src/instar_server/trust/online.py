"""Signing by the server's own keys: which of them count under which root. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, Root

from instar.core.errors import InputError
from instar_server.trust import rules
from instar_server.trust.records import OnlineSigners


def check_online(root: Root, online: OnlineSigners) -> None:
    """Raise InputError `wrong-online-keys` unless `online` can sign snapshot and timestamp under `root`."""
    for role, signers in (("snapshot", online.snapshot), ("timestamp", online.timestamp)):
        lack = rules.signers_missing(root, role, {signer.public_key.keyid for signer in signers})
        if lack:
            raise InputError("wrong-online-keys", f"cannot sign {role} metadata: {lack}")


def verifies_under(root: Root, *served: Metadata[Any] | None) -> bool:
    """Whether all of `served` is there and signed by the thresholds of `root`."""
    for metadata in served:
        if metadata is None:
            return False
        result = root.get_verification_result(
            metadata.signed.type, metadata.signed_bytes, metadata.signatures
        )
        if not result.verified:
            return False
    return True


def sign_under(metadata: Metadata[Any], signers: Sequence[Signer], roots: Sequence[Root]) -> bytes:
    """Sign with every key that one of `roots` lists for the role; it must then verify under all of them."""
    role = metadata.signed.type
    useful = {keyid for root in roots for keyid in root.roles[role].keyids}
    for signer in signers:
        if signer.public_key.keyid in useful:
            metadata.sign(signer, append=True)
    for root in roots:
        rules.check_signatures(metadata, root, f"root version {root.version}")
    return metadata.to_bytes()


def merge(old: OnlineSigners, new: OnlineSigners) -> OnlineSigners:
    """Both sets of signers, each key once."""

    def join(*groups: tuple[Signer, ...]) -> tuple[Signer, ...]:
        return tuple({signer.public_key.keyid: signer for group in groups for signer in group}.values())

    return OnlineSigners(join(old.snapshot, new.snapshot), join(old.timestamp, new.timestamp))
