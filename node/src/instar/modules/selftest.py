"""The job that every release can do (docs/protocol.md): prove which program this process runs from."""

from __future__ import annotations

import hashlib
from typing import Any

from instar.core.errors import InputError
from instar.modules.context import Context

NONCE_SIZE = 32  # hexadecimal digits


def run(args: dict[str, Any], context: Context) -> dict[str, Any]:
    """Answer the server's nonce. Raises InputError `bad-nonce`."""
    nonce = args.get("nonce")
    if not isinstance(nonce, str) or len(nonce) != NONCE_SIZE or set(nonce) - set("0123456789abcdef"):
        text = f"cannot test: expected a nonce of {NONCE_SIZE} hexadecimal digits, got {nonce!a:.80}"
        raise InputError("bad-nonce", text)
    digest, version = context.digest(), context.version
    return {"nonce": nonce, "answer": answer(nonce, digest, version), "version": version, "digest": digest}


def answer(nonce: str, digest: str, version: str) -> str:
    """SHA-256, hexadecimal, of `nonce:digest:version`."""
    return hashlib.sha256(f"{nonce}:{digest}:{version}".encode()).hexdigest()
