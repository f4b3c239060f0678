"""Who a node becomes: its key and request, and the operator's configuration that came with the program.

`instar.pyz inspect FILE [--pin HEX] [--json]` is the one-shot child by which the installer has a program
file checked. It prints one line of JSON, without the token:

    {"ok":true,"digest","config":{"server","group","root_version"},"fingerprint","comment_sha256"}
    {"ok":false,"error":{"code","text"}}

Who asked then reads the configuration itself (`instar.trust.embedded.read_embedded`) from bytes whose
comment has the SHA-256 `comment_sha256`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, InstarError, MachineError, TrustError
from instar.oneshot import diet, keygen
from instar.trust.embedded import EmbeddedConfig, read_embedded
from instar.trust.program import program_digest, split_program

COMMON_NAME = re.compile(r"[A-Za-z0-9.-]{1,64}")


def make_key_and_csr(name: str = "instar-node") -> tuple[bytes, bytes]:
    """(private key PEM, certificate request PEM), P-256. The server decides the name in the certificate.

    Raises MachineError `keygen-failed` when neither libcrypto nor the openssl program can do it.
    """
    if not COMMON_NAME.fullmatch(name):
        raise InputError("bad-name", f"cannot ask for a certificate for {name[:80]!r}")
    try:
        return keygen.by_libcrypto(name)
    except MachineError as first:
        try:
            return keygen.by_program(name)
        except MachineError as second:
            raise MachineError("keygen-failed", f"{second.text}; before that: {first.text}") from second


def check_embedded(program: bytes, pin: str | None = None) -> EmbeddedConfig:
    """The configuration in `program`, signed by a timestamp key of the very root that it carries.

    That proves that nobody changed a part of it. That the whole is the operator's is for `pin`, the
    fingerprint of the root. Raises InputError (no or unreadable configuration), TrustError
    `bad-embedded-root`, `config-signature`, `wrong-pin`.
    """
    config, data, signature = read_embedded(program)
    _check_signature(config, data, signature)
    if pin is not None and pin.lower() != config.fingerprint:
        raise TrustError(
            "wrong-pin",
            f"cannot trust this program's configuration: expected a root with the fingerprint {pin}, "
            f"got {config.fingerprint}",
        )
    return config


def _check_signature(config: EmbeddedConfig, data: bytes, signature: bytes) -> None:
    diet.apply()
    from securesystemslib.exceptions import UnverifiedSignatureError
    from securesystemslib.signer import Signature

    root = _checked_root(config.root)
    keyids = root.roles["timestamp"].keyids
    for keyid in keyids:
        try:
            root.get_key(keyid).verify_signature(Signature(keyid, signature.hex()), data)
        except (UnverifiedSignatureError, ValueError):
            continue
        return
    names = ", ".join(keyid[:8] for keyid in keyids)
    raise TrustError(
        "config-signature",
        f"cannot trust this program's configuration: expected a signature by a timestamp key of its root "
        f"({names}), got another: it was changed, or signed by somebody else",
    )


def _checked_root(value: dict[str, Any]) -> Any:
    """The root in the configuration, signed by its own threshold. Its expiry blocks no installation."""
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    try:
        metadata = Metadata[Root].from_dict(copy.deepcopy(value))  # from_dict takes the value apart
        if not isinstance(metadata.signed, Root):
            raise TypeError(f"expected root metadata, got {metadata.signed.type}")
        metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrustError(
            "bad-embedded-root", f"cannot trust this program's configuration: its root does not hold: {error}"
        ) from error
    return metadata.signed


def main(argv: list[str]) -> int:
    """The entry `inspect`."""
    parser = argparse.ArgumentParser(
        prog="instar inspect", description="Check a program file and the configuration that it carries."
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--pin", help="the fingerprint (SHA-256) that its root must have")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(argv)
    try:
        answer = _inspect(options.file, options.pin)
    except InstarError as error:
        if options.json:
            print(json.dumps({"ok": False, "error": error.as_json()}), flush=True)
        else:
            print(f"instar: {error.text} ({error.code})", file=sys.stderr, flush=True)
        return error.exit_status
    if options.json:
        print(json.dumps(answer), flush=True)
    else:
        config = answer["config"]
        print(f"program      {answer['digest']}")
        print(f"server       {config['server']}\ngroup        {config['group']}")
        print(f"fingerprint  {answer['fingerprint']}\nsigned       yes", flush=True)
    return 0


def _inspect(file: Path, pin: str | None) -> dict[str, Any]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError("no-program", f"cannot read {file}: {error.strerror}") from error
    config = check_embedded(data, pin)
    return {
        "ok": True,
        "digest": program_digest(data),
        "config": {
            "server": config.server,
            "group": config.group,
            "root_version": config.root["signed"]["version"],
        },
        "fingerprint": config.fingerprint,
        "comment_sha256": hashlib.sha256(split_program(data)[1]).hexdigest(),
    }
