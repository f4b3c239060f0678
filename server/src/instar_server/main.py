"""`instar-server`: make a server's folder, run the server. Only this file wires it to the machine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from instar.core.errors import InputError, InstarError
from instar_server import VERSION
from instar_server.ca import FleetCA
from instar_server.server import Server, renew_server_certificate
from instar_server.services.access import Access
from instar_server.services.ports import moment
from instar_server.settings import Layout, Settings, check, load, save
from instar_server.storage.database import Database
from instar_server.storage.migrate import upgrade
from instar_server.trust.files import make_folder, write_atomic
from instar_server.trust.keys import load_online
from instar_server.trust.repository import Repository
from instar_server.undo import undone
from instar_server.usage import OneLine

HELP = """The server of a fleet: the nodes' gateway, the operators' API, the signed repository.

'init' makes the server's folder, 'run' runs it. Everything else is done with instarctl, from anywhere."""

app = typer.Typer(
    cls=OneLine, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP
)

Data = Annotated[Path, typer.Option("--data", help="The server's folder.")]


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Refusals as one line and their exit status."""
    try:
        yield
    except InstarError as error:
        typer.echo(f"instar-server: {error.text} [{error.code}]", err=True)
        raise typer.Exit(error.exit_status) from None


@app.command()
def init(
    data: Data,
    host: Annotated[
        list[str], typer.Option(help="A name or address that nodes reach the server by; first the main one.")
    ],
    root: Annotated[Path, typer.Option(help="The signed root metadata (instarctl keys).")],
    online: Annotated[Path, typer.Option(help="Folder with the online keys snapshot.key and timestamp.key.")],
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    gateway_port: Annotated[int, typer.Option(help="Port for nodes; 0: any free one.")] = 8443,
    api_port: Annotated[int, typer.Option(help="Port for operators; 0: any free one.")] = 8444,
) -> None:
    """Make the server's folder: CA, certificate, database, repository, first API token."""
    with plain_errors():
        values = {"hosts": host, "bind": bind, "gateway_port": gateway_port, "api_port": api_port}
        secret = initialise(Layout(data), check(values, "the command line"), root, online)
        typer.echo(f"made {data}")
        typer.echo(f"API token of the first admin, also in {Layout(data).admin_token}: {secret}")


def initialise(layout: Layout, settings: Settings, root: Path, online: Path) -> str:
    """What `init` does. The first admin's API token. Raises InputError `already-there`, …; then nothing is made."""
    if layout.config.exists():
        raise InputError("already-there", f"cannot make {layout.data}: {layout.config} exists")
    now = time.time()
    try:
        root_bytes = root.read_bytes()
    except OSError as error:
        raise InputError("no-root", f"cannot read {root}: {error.strerror}") from error
    with undone(layout):
        return _make(layout, settings, root_bytes, online, now)


def _make(layout: Layout, settings: Settings, root: bytes, online: Path, now: float) -> str:
    """Every part of the folder. The keys come after the root that they are for, which may be refused."""
    signers = load_online(online)
    make_folder(layout.data)
    layout.data.chmod(0o700)
    Repository.create(layout.trust, root, signers, moment(now)).close()
    _copy_online(online, layout.online)
    ca = FleetCA.create(layout.ca, now) if not (layout.ca / "key.pem").exists() else FleetCA.load(layout.ca)
    renew_server_certificate(layout, settings, ca, now)
    upgrade(layout.database)
    secret = asyncio.run(_first_admin(layout))
    write_atomic(layout.admin_token, f"{secret}\n".encode(), 0o600)
    save(layout, settings)  # last: its presence means that the folder is complete
    return secret


def _copy_online(source: Path, folder: Path) -> None:
    make_folder(folder)
    folder.chmod(0o700)
    for path in sorted(source.iterdir()):
        if path.name.startswith(("snapshot", "timestamp")) and path.is_file():
            target = folder / path.name
            if not (target.exists() and path.samefile(target)):
                write_atomic(target, path.read_bytes(), 0o600)


async def _first_admin(layout: Layout) -> str:
    import secrets

    database = Database(layout.database, readers=1)
    try:
        _, secret = await Access(database, time.time, secrets.token_hex).make("admin", "first admin")
        return secret
    finally:
        await database.close()


@app.command()
def run(
    data: Data,
    gateway_port: Annotated[int | None, typer.Option(help="Port for nodes; 0: any free one.")] = None,
    api_port: Annotated[int | None, typer.Option(help="Port for operators; 0: any free one.")] = None,
    artifacts_port: Annotated[
        int | None,
        typer.Option(
            help="A second port for nodes, for metadata and targets alone; 0: any free one, -1: none."
        ),
    ] = None,
    bind: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    insecure_http: Annotated[
        bool | None, typer.Option("--insecure-http", help="API without TLS; loopback only.")
    ] = None,
    ping_s: Annotated[float | None, typer.Option(help="How often nodes ping, in seconds.")] = None,
    look_floor_s: Annotated[
        float | None, typer.Option(help="Least time between two looks of a node.")
    ] = None,
    native_block: Annotated[
        int | None, typer.Option(help="Bytes of a block of a transfer through the channel.")
    ] = None,
    native_window: Annotated[int | None, typer.Option(help="Blocks of a transfer under way.")] = None,
    native_rate: Annotated[
        int | None, typer.Option(help="Most bytes a second of a transfer to one node; 0: no cap.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
) -> None:
    """Run the server until SIGTERM or SIGINT."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    with plain_errors():
        settings = load(
            Layout(data),
            gateway_port=gateway_port,
            api_port=api_port,
            artifacts_port=artifacts_port,
            bind=bind,
            insecure_http=insecure_http,
            ping_s=ping_s,
            look_floor_s=look_floor_s,
            native_block=native_block,
            native_window=native_window,
            native_rate=native_rate,
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            status = runner.run(_serve(Layout(data), settings))
    raise typer.Exit(status)


async def _serve(layout: Layout, settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(layout, settings)
    await server.start()
    gc.collect()
    gc.freeze()  # what the start has made stays until the end: no later collection need look at it
    print(f"instar-server {VERSION} ready: {server.ports()}", flush=True)
    stopping, broken = asyncio.create_task(stop.wait()), asyncio.create_task(server.broken())
    await asyncio.wait({stopping, broken}, return_when=asyncio.FIRST_COMPLETED)
    status = 0 if stopping.done() else 1
    broken.cancel()
    stopping.cancel()
    await server.stop()
    return status


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(VERSION)


if __name__ == "__main__":
    app()
