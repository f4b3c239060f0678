"""Keys and certificates for simulated nodes, by the same enrolment as real ones."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from instar.core.errors import InputError, ServerRefused, ServerUnreachable

AT_ONCE = 16  # enrolments under way at a time
Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Identity:
    """One simulated node. `pem` holds its key and its certificate."""

    node: str
    pem: Path
    ca: Path

    def context(self) -> ssl.SSLContext:
        """As a node makes it: TLS 1.2 or newer, the fleet's CA alone, the own certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cafile=str(self.ca))
        context.load_cert_chain(str(self.pem))
        return context


async def enrol(server: str, ca: Path, token: str, count: int, folder: Path) -> list[Identity]:
    """Enrol `count` nodes at `server` ("https://host:port"); files go to `folder`.

    Raises InputError `no-ca`, ServerUnreachable `unreachable`, ServerRefused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = trusting(ca)
    turns = asyncio.Semaphore(AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(server, timeout=timeout) as session:
        ask = partial(_ask, session, server, context)

        async def one(number: int) -> Identity:
            async with turns:
                return await _enrol_one(ask, token, ca, folder / f"{number}.pem")

        return list(await asyncio.gather(*(one(number) for number in range(count))))


def trusting(ca: Path) -> ssl.SSLContext:
    """TLS that believes the certificates in `ca` alone. Raises InputError `no-ca`."""
    try:
        return ssl.create_default_context(cafile=str(ca))
    except OSError as error:  # an SSLError is one too
        text = (
            f"cannot connect: expected the fleet's CA certificate (the server's ca/ca.pem), got {ca}: {error}"
        )
        raise InputError("no-ca", text) from error


async def _enrol_one(ask: Ask, token: str, ca: Path, pem: Path) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    body = {
        "v": 1,
        "token": token,
        "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
        "facts": {"simulated": True},
    }
    said = await ask(body)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(private + said["certificate"].encode())
    pem.chmod(0o600)
    return Identity(said["node"], pem, ca)


async def _ask(
    session: aiohttp.ClientSession, server: str, context: ssl.SSLContext, body: dict[str, Any]
) -> dict[str, Any]:
    """The answer to one enrolment. Raises ServerUnreachable `unreachable`, ServerRefused with the server's code."""
    try:
        async with session.post("/v1/enrol", json=body, ssl=context) as answer:
            said: dict[str, Any] = await answer.json()
    except (aiohttp.ClientError, OSError) as error:  # a TimeoutError and an SSLError are OSErrors
        cause = error.__cause__ or error  # aiohttp's own text of it shows an object's address
        why = " ".join(str(cause).split()) or type(cause).__name__
        way_out = "is the server running there, and --ca its ca/ca.pem?"
        raise ServerUnreachable("unreachable", f"cannot enrol at {server}: {why}; {way_out}") from error
    if answer.status != 200:
        refusal = said.get("error", {})
        raise ServerRefused(str(refusal.get("code")), f"cannot enrol: {refusal.get('message')}")
    return said
