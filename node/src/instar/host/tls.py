"""TLS contexts of a node: the fleet's own CA and nothing else is trusted."""

from __future__ import annotations

import ssl
from pathlib import Path

from instar.core.errors import MachineError


def server_context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """A context for being called: only by those who show a certificate that `ca` signed.

    Nothing of a session is kept: each connection shows its certificate anew. Raises MachineError `bad-identity`.
    """
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
        context.num_tickets = 0
        context.load_verify_locations(str(ca))
        context.load_cert_chain(str(certificate), str(key))
    except (OSError, ssl.SSLError) as error:
        raise MachineError("bad-identity", f"cannot use {ca.parent}: {error}") from None
    return context


def client_context(
    ca: Path, certificate: Path | None = None, key: Path | None = None, public: bool = False
) -> ssl.SSLContext:
    """A context that trusts `ca` alone, with the node's certificate where one is given. `public`: it trusts
    those whom this machine trusts, too.

    Raises MachineError `bad-identity`, naming the file. An expired certificate loads: the server says no.
    """
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(str(ca))
        if public:
            context.load_default_certs()
        if certificate is not None:
            context.load_cert_chain(str(certificate), str(key) if key else None)
    except (OSError, ssl.SSLError) as error:
        raise MachineError("bad-identity", f"cannot use {ca.parent}: {error}") from None
    return context
