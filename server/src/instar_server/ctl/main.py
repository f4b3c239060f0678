"""`instarctl`: only wiring. Each command group is a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from instar.core.errors import InputError
from instar_server import VERSION
from instar_server.ctl import (
    bundle,
    fleet,
    jobs,
    keys,
    modules,
    nodes,
    operators,
    release,
    restart,
    systems,
    tokens,
    transfers,
    updater,
    updater_system,
    words,
)
from instar_server.ctl.client import config_path, find_access
from instar_server.ctl.entry import Entry
from instar_server.ctl.output import AsJson, Options, given, plain_errors, show
from instar_server.trust.files import make_folder, write_atomic

Server = Annotated[str | None, typer.Option(help="The API's URL, https://host:port.")]
Token = Annotated[Path | None, typer.Option(help="File with the API token.")]
Authority = Annotated[Path | None, typer.Option(help="The server's CA certificate.")]


def login(
    context: typer.Context,
    server: Server = None,
    token: Token = None,
    ca: Authority = None,
    as_json: AsJson = False,
) -> None:
    """Remember the server for later calls; the token stays in its file. Both must be given."""
    with plain_errors(as_json):
        said = given(context, Options(server, token, ca))
        if said.server is None or said.token_file is None:
            raise InputError("bad-options", "cannot log in: expected --server URL and --token FILE")
        file, authority = said.token_file.absolute(), said.ca.absolute() if said.ca else None
        access = find_access(said.server, file, authority, {})
        values = {"server": access.server, "token_file": str(file), "ca": access.ca}
        path = config_path()
        make_folder(path.parent)
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
        write_atomic(path, text.encode(), 0o600)
    show({"path": str(path), **values}, as_json, lambda: f"wrote {path}")


app = typer.Typer(
    cls=Entry,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=words.MAIN,
    epilog=words.FIRST_DAY,
    rich_markup_mode="rich",
)
app.command("login", epilog=words.EXAMPLES["login"])(login)
app.command("status")(fleet.status)
app.add_typer(tokens.app, name="tokens", help=words.TOKENS, epilog=words.EXAMPLES["tokens"])
app.add_typer(fleet.program, name="program", help=words.PROGRAM, epilog=words.EXAMPLES["program"])
nodes.app.command("transfer")(transfers.transfer)
nodes.app.command("recover")(transfers.recover)
nodes.app.command("update-os")(systems.update_os)
nodes.app.command("cancel-os")(systems.cancel_os)
nodes.app.command("system")(systems.system)
nodes.app.command("cold-boot")(systems.cold_boot)
app.add_typer(nodes.app, name="nodes", help=words.NODES, epilog=words.EXAMPLES["nodes"])
app.add_typer(nodes.app, name="node", hidden=True)  # the same by the name that one types for one of them
app.add_typer(nodes.groups, name="groups", help="Groups of nodes.")
app.command("want", epilog=words.EXAMPLES["want"])(fleet.want)
app.command("unwant", epilog=words.EXAMPLES["unwant"])(fleet.unwant)
app.command("wishes")(fleet.wishes)
app.add_typer(jobs.app, name="job", help=words.JOB, epilog=words.EXAMPLES["job"])
app.command("restart", epilog=words.EXAMPLES["restart"])(restart.restart)
modules.app.command("list")(fleet.list_modules)
app.add_typer(modules.app, name="module", help=words.MODULE, epilog=words.EXAMPLES["module"])
app.add_typer(fleet.releases, name="releases", help="Published releases.")
app.add_typer(release.app, name="release")
app.add_typer(bundle.app, name="bundle", help=words.BUNDLE, epilog=words.EXAMPLES["bundle"])
app.add_typer(keys.app, name="keys")
app.add_typer(fleet.trust, name="trust", help=words.TRUST)
app.add_typer(operators.app, name="operator", help=words.OPERATOR, epilog=words.EXAMPLES["operator"])
updater.app.command("update-os")(updater_system.update_os)
updater.app.command("system")(updater_system.system)
app.add_typer(updater.app, name="updater", help=words.UPDATER, epilog=words.EXAMPLES["updater"])
app.add_typer(tokens.api, name="api-tokens", help=words.API_TOKENS)


@app.callback()
def options(
    context: typer.Context,
    server: Server = None,
    token: Token = None,
    ca: Authority = None,
) -> None:
    context.obj = Options(server, token, ca)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    show({"version": VERSION}, as_json, lambda: VERSION)


if __name__ == "__main__":
    app()
