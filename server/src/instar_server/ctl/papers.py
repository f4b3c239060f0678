"""What the offline commands share: files of metadata, passphrases, output as text or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from instar.core.errors import InputError
from instar_server.trust import keys
from instar_server.trust.files import write_atomic

AsJson = Annotated[bool, typer.Option("--json", help="One line of JSON instead of text.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help="File whose first line is the passphrase. Else $INSTAR_PASSPHRASE, else a prompt."),
]


def say(as_json: bool, value: dict[str, Any], lines: Sequence[str]) -> None:
    """Print `value` as JSON, or `lines`."""
    typer.echo(json.dumps(value) if as_json else "\n".join(lines))


def read(path: Path) -> bytes:
    """Raises InputError `no-file`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError("no-file", f"cannot read {path}: {error.strerror}") from error


def write(path: Path, data: bytes) -> None:
    """Write durably. Raises InputError `no-folder` where there is none, MachineError when the disk fails."""
    if not path.parent.is_dir():
        raise InputError("no-folder", f"cannot write {path}: {path.parent} is no folder")
    write_atomic(path, data)


def in_days(days: float) -> datetime:
    """The moment so many days from now. Raises InputError `bad-days`."""
    if not 0 < days <= 3650:
        raise InputError("bad-days", f"cannot let it be good for {days:g} days: expected 0 to 3650")
    return datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)


def asker(file: Path | None, confirm: bool = False) -> keys.Ask:
    """Where a command takes passphrases from. A prompt asks twice when `confirm`."""

    def prompt(name: str) -> bytes:
        return str(
            typer.prompt(f"Passphrase of {name}", hide_input=True, confirmation_prompt=confirm, err=True)
        ).encode()

    ask = keys.passphrase_source(file, os.environ, prompt)
    return ask if ask is not None else prompt


def when(moment: float) -> str:
    """A unix time as a date that people read."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")
