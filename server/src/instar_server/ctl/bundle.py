"""`instarctl bundle`: what an author of system images does. Works offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from instar_server.ctl.output import plain_errors, progress_bar
from instar_server.ctl.papers import AsJson, say
from instar_server.trust import bundle as bundles

app = typer.Typer(no_args_is_help=True)


@app.command()
def build(
    root: Annotated[Path, typer.Option(help="The root image, with its dm-verity tree behind it.")],
    kernel: Annotated[Path, typer.Option(help="The unified kernel image (.linux, .initrd, .cmdline).")],
    name: Annotated[str, typer.Option(help="What the system is called.")],
    version: Annotated[str, typer.Option(help="Its version, N.N.N.")],
    compatible: Annotated[list[str], typer.Option(help="Hardware that it fits; may be given again.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; NAME-VERSION.bundle if not given.")
    ] = None,
    arch: Annotated[str, typer.Option(help="As uname -m says.")] = "x86_64",
    min_version: Annotated[str, typer.Option(help="The oldest system that may take it.")] = "",
    deny_kexec: Annotated[
        list[str] | None, typer.Option(help="Hardware on which it is started by reboot only.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make one file of a root image and a kernel image. The same images give the same bytes.

    Then list, sign and publish it as any release: release add, release sign, release publish.
    """
    with plain_errors(as_json):
        about = bundles.About(name, version, tuple(compatible), arch, min_version, tuple(deny_kexec or ()))
        path = out or Path(f"{name}-{version}.bundle")
        with progress_bar(f"packing {path.name}", quiet=as_json) as progress:
            built = bundles.build(about, root, kernel, path, progress)
        _tell(as_json, path, built)


@app.command()
def show(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    as_json: AsJson = False,
) -> None:
    """Say what a bundle holds, and what is to be signed of it."""
    with plain_errors(as_json):
        _tell(as_json, bundle, bundles.describe(bundle))


def _tell(as_json: bool, path: Path, built: bundles.Built) -> None:
    document: dict[str, Any] = {
        "bundle": str(path), "target": built.path, "length": built.length, "sha256": built.sha256,
        "custom": built.custom,
    }  # fmt: skip
    lines = [
        f"{path} ({built.length:,} bytes)",
        f"target   {built.path}",
        f"sha256   {built.sha256}",
        f"bundle   {built.custom['digest']}",
    ]
    say(as_json, document, lines)
