"""`instarctl operator`: certificates for the API of nodes' updaters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from instar.core.errors import InputError
from instar_server.ctl.output import AsJson, connected, plain_errors, show, when
from instar_server.ctl.tokens import seconds
from instar_server.trust.files import make_folder, write_atomic

CERTIFICATE, KEY, CA = "cert.pem", "key.pem", "ca.pem"

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """A group, although it has one command."""


@app.command("issue")
def issue(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Who it is for; nodes' logs say it.")],
    out: Annotated[Path, typer.Option(help="Folder for cert.pem, key.pem and ca.pem.")],
    lifetime: Annotated[str, typer.Option(help="Like 12h, 7d; at most 365d.")] = "30d",
    as_json: AsJson = False,
) -> None:
    """Make a key here and have it certified. Needs an admin's token. Nodes cannot be told to refuse it later."""
    with plain_errors(as_json):
        lifetime_s = seconds(lifetime)
        if (out / KEY).exists():
            raise InputError("already-there", f"cannot make a key: {out / KEY} exists")
        make_folder(out)
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = csr.public_bytes(serialization.Encoding.PEM).decode()
    with connected(context) as client:
        made = client.post("/operators", {"name": name, "csr": pem, "lifetime_s": lifetime_s})
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with plain_errors(as_json):
        write_atomic(out / KEY, private, 0o600)
        write_atomic(out / CERTIFICATE, made["certificate"].encode())
        write_atomic(out / CA, made["ca"].encode())
    told = {"name": name, "folder": str(out), "serial": made["serial"], "not_after": made["not_after"]}
    show(
        told,
        as_json,
        lambda: f"wrote {out}: {name} may use nodes' updaters; it ends {when(made['not_after'])}",
    )
