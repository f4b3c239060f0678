"""Keys and certificates for simulated nodes, by the same enrolment as real ones."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from instar.core.errors import ServerRefused

AT_ONCE = 16  # enrolments under way at a time


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
    """Enrol `count` nodes at `server` ("https://host:port"); files go to `folder`. Raises ServerRefused."""
    folder.mkdir(parents=True, exist_ok=True)
    context = ssl.create_default_context(cafile=str(ca))
    turns = asyncio.Semaphore(AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(server, timeout=timeout) as session:

        async def one(number: int) -> Identity:
            async with turns:
                return await _enrol_one(session, context, token, ca, folder / f"{number}.pem")

        return list(await asyncio.gather(*(one(number) for number in range(count))))


async def _enrol_one(
    session: aiohttp.ClientSession, context: ssl.SSLContext, token: str, ca: Path, pem: Path
) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    body = {
        "v": 1,
        "token": token,
        "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
        "facts": {"simulated": True},
    }
    async with session.post("/v1/enrol", json=body, ssl=context) as answer:
        said = await answer.json()
        if answer.status != 200:
            error = said.get("error", {})
            raise ServerRefused(str(error.get("code")), f"cannot enrol: {error.get('message')}")
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(private + said["certificate"].encode())
    pem.chmod(0o600)
    return Identity(said["node"], pem, ca)
