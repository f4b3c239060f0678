"""`instarctl module`: what an author of modules does. Works offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from instar_server.ctl.output import plain_errors
from instar_server.ctl.papers import AsJson, say, write
from instar_server.trust.module_source import pack_module

app = typer.Typer(no_args_is_help=True)


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="The module's folder, with its module.toml.")],
    out: Annotated[Path, typer.Option(help="Folder for the archive.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Make the module's archive: manifest.json and its files. The same folder gives the same bytes.

    Then list, sign and publish it as any release: release add, release sign, release publish.
    """
    with plain_errors(as_json):
        release = pack_module(folder)
        path = out / Path(release.path).name
        write(path, release.archive)
        say(
            as_json,
            {
                "archive": str(path),
                "target": release.path,
                "sha256": release.sha256,
                "custom": release.custom,
            },
            [
                f"wrote {path} ({len(release.archive):,} bytes)",
                f"target   {release.path}",
                f"sha256   {release.sha256}",
                f"module   {release.digest}",
            ],
        )
