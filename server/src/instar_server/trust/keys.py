"""Signing keys at rest: `<name>.key` (PKCS#8 PEM, mode 0600) beside `<name>.pub.json`.

Offline keys are encrypted by a passphrase. A key's id is what securesystemslib computes from its public
part, so one key has one id everywhere.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey

from instar.core.errors import InputError, MachineError
from instar.trust.fields import Fields
from instar_server.trust.files import make_folder, write_atomic
from instar_server.trust.pkcs8 import encrypted_pem
from instar_server.trust.records import OnlineSigners

Ask = Callable[[str], bytes]  # the name of a key -> its passphrase
ENVIRONMENT = "INSTAR_PASSPHRASE"
MIN_PASSPHRASE = 8  # bytes


@dataclass(frozen=True, slots=True)
class KeyPaths:
    private: Path
    public: Path


def key_paths(folder: Path, name: str) -> KeyPaths:
    return KeyPaths(folder / f"{name}.key", folder / f"{name}.pub.json")


def generate(folder: Path, name: str, passphrase: bytes | None) -> SSlibKey:
    """Make the key `name` in `folder`. `passphrase` None leaves it unencrypted, for online keys.

    Raises InputError `key-exists` (a key is never overwritten), `weak-passphrase`, `bad-name`.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InputError("bad-name", f"cannot make the key {name!r}: use letters, digits, '-' and '_'")
    if passphrase is not None and len(passphrase) < MIN_PASSPHRASE:
        raise InputError(
            "weak-passphrase", f"cannot make the key {name}: a passphrase has at least {MIN_PASSPHRASE} bytes"
        )
    paths = key_paths(folder, name)
    if paths.private.exists() or paths.public.exists():
        raise InputError("key-exists", f"cannot make the key {name}: {paths.private} is there already")
    make_folder(folder)
    private = Ed25519PrivateKey.generate()
    if passphrase is None:
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    else:
        pem = encrypted_pem(private, passphrase, os.urandom(16), os.urandom(16))
    public = SSlibKey.from_crypto(private.public_key())
    write_atomic(paths.private, pem, 0o600)
    write_atomic(paths.public, public_json(public))
    return public


def load(path: Path, ask: Ask | None) -> CryptoSigner:
    """The signer in the PEM file `path`; `ask` gives the passphrase if it is encrypted.

    Raises InputError `no-key`, `bad-key`, `passphrase-needed`, `wrong-passphrase`, `key-readable`
    (others may read the file). Nothing of the key stands in an error.
    """
    data = _read_private(path)
    encrypted = b"ENCRYPTED" in data.split(b"\n", 1)[0]
    if encrypted and ask is None:
        raise InputError("passphrase-needed", f"cannot use {path}: it is encrypted; no passphrase was given")
    passphrase = ask(path.stem) if encrypted and ask else None
    try:
        key = load_pem_private_key(data, passphrase)
    except ValueError as error:
        if encrypted:
            raise InputError(
                "wrong-passphrase", f"cannot use {path}: this passphrase does not open it"
            ) from None
        raise InputError("bad-key", f"cannot use {path}: expected a private key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError("bad-key", f"cannot use {path}: expected an ed25519 key, got {type(key).__name__}")
    return CryptoSigner(key, SSlibKey.from_crypto(key.public_key()))


def load_public(path: Path) -> SSlibKey:
    """The public key in a `.pub.json` file. Raises InputError `no-key`, `bad-key`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("no-key", f"cannot read {path}: {error.strerror}") from error
    return parse_public(data, str(path))


def parse_public(data: bytes, what: str) -> SSlibKey:
    """The public key in the JSON text `data`; its id must be the one that its content gives."""
    fields = Fields.decode(data, what, "bad-key")
    for name, expected in (("keytype", "ed25519"), ("scheme", "ed25519")):
        if fields.get(name, str) != expected:
            raise fields.error(f"expected {name!r} to be {expected}")
    public = fields.hexadecimal("public", 64)
    key = make_public(bytes.fromhex(public))
    if fields.get("keyid", str) != key.keyid:
        raise fields.error(f"expected 'keyid' to be {key.keyid}, the id of this key")
    return key


def make_public(raw: bytes) -> SSlibKey:
    """The public key of 32 raw bytes, as some other program or token exports it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(raw))


def public_json(key: SSlibKey) -> bytes:
    """What stands in a `.pub.json` file."""
    value = {
        "keyid": key.keyid,
        "keytype": key.keytype,
        "scheme": key.scheme,
        "public": key.keyval["public"],
    }
    return (json.dumps(value, indent=1) + "\n").encode()


def passphrase_source(file: Path | None, environment: Mapping[str, str], prompt: Ask | None) -> Ask | None:
    """Where passphrases come from: the file when given, else INSTAR_PASSPHRASE, else the prompt."""
    if file is not None:
        passphrase = _read_passphrase(file)
        return lambda name: passphrase
    if environment.get(ENVIRONMENT):
        value = environment[ENVIRONMENT].encode()
        return lambda name: value
    return prompt


def generate_online(folder: Path, passphrase: bytes | None = None) -> dict[str, SSlibKey]:
    """Make the server's own keys `snapshot` and `timestamp` in `folder`."""
    return {role: generate(folder, role, passphrase) for role in ("snapshot", "timestamp")}


def load_online(folder: Path, passphrase_file: Path | None = None) -> OnlineSigners:
    """The keys `snapshot*.key` and `timestamp*.key` in `folder`; several of one role during a change.

    Raises InputError as `load` does.
    """
    ask = passphrase_source(passphrase_file, {}, None)
    found = {}
    for role in ("snapshot", "timestamp"):
        paths = sorted(folder.glob(f"{role}*.key"))
        if not paths:
            raise InputError("no-key", f"cannot sign {role} metadata: no {role}*.key in {folder}")
        found[role] = tuple(load(path, ask) for path in paths)
    return OnlineSigners(found["snapshot"], found["timestamp"])


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(65_536)
    except FileNotFoundError:
        raise InputError("no-key", f"cannot read the key {path}: no such file") from None
    except OSError as error:
        raise MachineError("disk-failed", f"cannot read the key {path}: {error.strerror}") from error
    got = stat.S_IMODE(mode)
    if got & 0o077:
        raise InputError(
            "key-readable", f"cannot use {path}: expected mode 0600, got {got:04o}: others may read it"
        )
    return data


def _read_passphrase(file: Path) -> bytes:
    try:
        text = file.read_bytes()
    except OSError as error:
        raise InputError(
            "no-passphrase", f"cannot read the passphrase in {file}: {error.strerror}"
        ) from error
    passphrase = text.split(b"\n", 1)[0].rstrip(b"\r")
    if not passphrase:
        raise InputError("no-passphrase", f"cannot use the passphrase file {file}: its first line is empty")
    return passphrase
