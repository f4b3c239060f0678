"""`instarctl`: only wiring. Each command group is a file of its own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated

import typer

from instar_server import VERSION
from instar_server.ctl import fleet, nodes, tokens
from instar_server.ctl.client import config_path, find_access
from instar_server.ctl.output import Options, plain_errors
from instar_server.trust.files import make_folder, write_atomic

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(nodes.app, name="nodes", help="Nodes: what they run, how they are, what happened.")
app.add_typer(nodes.groups, name="groups", help="Groups of nodes.")
app.add_typer(tokens.app, name="tokens", help="Enrolment tokens.")
app.add_typer(tokens.api, name="api-tokens", help="Tokens for the API and this command.")
app.add_typer(fleet.program, name="program", help="The one file that installs a node.")
app.add_typer(fleet.trust, name="trust", help="The signed repository.")
app.command("want")(fleet.want)
app.command("unwant")(fleet.unwant)
app.command("wishes")(fleet.wishes)
app.command("status")(fleet.status)
for name, help_ in (
    ("keys", "Signing keys and root metadata, offline."),
    ("release", "Make, sign, publish releases."),
):
    app.add_typer(importlib.import_module(f"instar_server.ctl.{name}").app, name=name, help=help_)
app.add_typer(fleet.releases, name="releases", help="Published releases.")


@app.callback()
def options(
    context: typer.Context,
    server: Annotated[str | None, typer.Option(help="The API's URL, https://host:port.")] = None,
    token: Annotated[Path | None, typer.Option(help="File with the API token.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The server's CA certificate.")] = None,
) -> None:
    context.obj = Options(server, token, ca)


@app.command()
def login(
    context: typer.Context,
    server: Annotated[str, typer.Option(help="The API's URL, https://host:port.")],
    token: Annotated[Path, typer.Option(help="File with the API token.")],
    ca: Annotated[Path | None, typer.Option(help="The server's CA certificate.")] = None,
) -> None:
    """Remember the server for later calls; the token stays in its file."""
    with plain_errors():
        access = find_access(server, token.absolute(), ca.absolute() if ca else None, {})
        values = {"server": access.server, "token_file": str(token.absolute()), "ca": access.ca}
        path = config_path()
        make_folder(path.parent)
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
        write_atomic(path, text.encode(), 0o600)
    typer.echo(f"wrote {path}")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(VERSION)


if __name__ == "__main__":
    app()
