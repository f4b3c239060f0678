"""The operator's configuration in the zip comment: `<base64(JSON)>.<base64(signature)>`, nothing else.

Only the form is checked here; whether the signature is good is for `instar.oneshot.identity.check_embedded`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from instar.core.errors import InputError
from instar.trust.fields import Fields
from instar.trust.program import MAX_COMMENT, split_program

FORM = re.compile(rb"([A-Za-z0-9+/]+={0,2})\.([A-Za-z0-9+/]+={0,2})")
SERVER = re.compile(r"https://(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})/?")
STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
UNIT = re.compile(rb"\\u[0-9a-fA-F]{4}|\\.|[^\\]", re.DOTALL)
RESPELLINGS = 1_000  # far over what chance needs
SIGNATURE_SIZE = 64  # bytes of an ed25519 signature
CODE = "bad-configuration"


@dataclass(frozen=True, slots=True)
class EmbeddedConfig:
    """What a node needs to enrol. `ca` is PEM, `root` the TUF root metadata as decoded JSON."""

    v: int
    server: str
    ca: str
    root: dict[str, Any]
    token: str
    group: str

    @classmethod
    def decode(cls, data: bytes) -> EmbeddedConfig:
        """Read the JSON text. Raises InputError `bad-configuration` that names the field at fault."""
        fields = Fields.decode(data, "the embedded configuration", CODE)
        v = fields.get("v", int)
        if v != 1:
            raise fields.error(f"expected 'v' to be 1, got {v}")
        config = cls(
            v,
            fields.get("server", str),
            fields.get("ca", str),
            fields.get("root", dict),
            fields.get("token", str),
            fields.get("group", str),
        )
        _check_server(config.server, fields)
        if "-----BEGIN CERTIFICATE-----" not in config.ca:
            raise fields.error("expected 'ca' to be a certificate in PEM")
        for name, value in (("token", config.token), ("group", config.group)):
            if not value:
                raise fields.error(f"the field {name!r} is empty")
        return config

    def encode(self) -> bytes:
        """The JSON text that gets signed; the same configuration gives the same bytes."""
        value = {name: getattr(self, name) for name in ("v", "server", "ca", "root", "token", "group")}
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")

    @property
    def fingerprint(self) -> str:
        """What an operator compares: SHA-256, hexadecimal, of the root metadata's canonical JSON."""
        return fingerprint(self.root)


def _check_server(server: str, fields: Fields) -> None:
    match = SERVER.fullmatch(server)
    if match is None or not 0 < int(match[1]) <= 65_535:
        raise fields.error(f"expected 'server' to be https://host:port, got {server[:200]!r}")


def format_comment(data: bytes, sign: Callable[[bytes], bytes]) -> bytes:
    """The comment for the JSON text `data`, signed by `sign` (bytes to 64 bytes).

    Base64 may hold the letters 'PK' by chance ('O+' in a certificate gives them in one place of three),
    and every reader refuses them; the same JSON is then spelled another way (a blank between tokens,
    `\\u0041` for an 'A') and signed as that.
    Raises InputError `comment-too-large`.
    """
    for _ in range(RESPELLINGS):
        if len(data) * 4 // 3 > MAX_COMMENT:
            break
        text = base64.b64encode(data)
        at = text.find(b"PK")
        if at >= 0:
            data = _respell(data, at * 3 // 4)
            continue
        signature = base64.b64encode(sign(data))
        if b"PK" in signature:
            data += b" "
            continue
        if len(text) + 1 + len(signature) > MAX_COMMENT:
            break
        return text + b"." + signature
    raise InputError(
        "comment-too-large",
        f"cannot embed the configuration: expected a comment of at most {MAX_COMMENT} bytes, "
        f"got one of {len(data) * 4 // 3 + 90}",
    )


def _respell(data: bytes, at: int) -> bytes:
    """Another spelling of the same JSON text (ASCII) that differs at, or shortly before, byte `at`."""
    blank = 0
    for string in STRING.finditer(data):
        if string.start() >= at:
            break
        blank = string.start()
        if at < string.end() - 1:
            units = UNIT.finditer(data, blank + 1, string.end() - 1)
            before = [unit.start() for unit in units if len(unit[0]) == 1 and unit.start() <= at]
            if before:
                place = before[-1]
                return data[:place] + b"\\u%04x" % data[place] + data[place + 1 :]
    return data[:blank] + b" " + data[blank:]


def parse_comment(comment: bytes) -> tuple[bytes, bytes]:
    """(JSON text, signature) of a comment. Raises InputError `no-configuration` and `bad-comment`."""
    if not comment:
        raise InputError("no-configuration", "cannot read the embedded configuration: the program has none")
    if b"PK" in comment:
        raise InputError("bad-comment", "cannot read the embedded configuration: the comment holds 'PK'")
    match = FORM.fullmatch(comment)
    if match is None:
        raise InputError("bad-comment", f"cannot read the embedded configuration: {_foreign(comment)}")
    try:
        data, signature = (base64.b64decode(part, validate=True) for part in match.groups())
    except binascii.Error as error:
        raise InputError("bad-comment", f"cannot read the embedded configuration: {error}") from error
    if len(signature) != SIGNATURE_SIZE:
        raise InputError(
            "bad-comment",
            "cannot read the embedded configuration: "
            f"expected a signature of {SIGNATURE_SIZE} bytes, got {len(signature)}",
        )
    return data, signature


def read_embedded(program: bytes) -> tuple[EmbeddedConfig, bytes, bytes]:
    """(configuration, its JSON text, signature) of a program file. The signature is NOT checked here."""
    _, comment = split_program(program)
    data, signature = parse_comment(comment)
    return EmbeddedConfig.decode(data), data, signature


def _foreign(comment: bytes) -> str:
    for place, byte in enumerate(comment):
        if not (chr(byte).isascii() and (chr(byte).isalnum() or byte in b"+/=.")):
            return f"byte {place} is 0x{byte:02x}, expected base64 or '.'"
    return "expected two base64 parts with one '.' between"


def canonical(value: object) -> bytes:
    """OLPC canonical JSON, the form in which TUF metadata is hashed and signed. Refuses floats."""
    if isinstance(value, str):
        return b'"' + value.replace("\\", "\\\\").replace('"', '\\"').encode("utf-8") + b'"'
    if value is None or isinstance(value, (bool, int)):
        return json.dumps(value).encode()
    if isinstance(value, list):
        return b"[" + b",".join(canonical(item) for item in value) + b"]"
    if isinstance(value, dict):
        pairs = (canonical(key) + b":" + canonical(item) for key, item in sorted(value.items()))
        return b"{" + b",".join(pairs) + b"}"
    raise InputError(CODE, f"cannot write canonical JSON: {type(value).__name__} has no such form")


def fingerprint(root: dict[str, Any]) -> str:
    """SHA-256, hexadecimal, of the root metadata's canonical JSON."""
    return hashlib.sha256(canonical(root)).hexdigest()
