"""Commands that outlive this process.

    commands/<number>.<id>.json        asked for, under way, or ended and not acknowledged by the server
    commands/done/<number>.<id>.json   acknowledged; the newest KEPT, so that a late repeat is known

The number keeps the order of arrival. Each file holds one command and where it stands, and is replaced as a
whole. One that cannot be read is set aside as `.unreadable`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

from instar.agent.store import JOB_ID
from instar.core.errors import InstarError
from instar.core.light import dataclass
from instar.host.files import DISK, failed, make_folder, write_atomic
from instar.wire.codec import decode, encode
from instar.wire.messages import Command, CommandStatus

KEPT = 256  # of those that have ended: so many acknowledged ones, and so many others

log = logging.getLogger("instar.agent")


@dataclass(slots=True)
class Entry:
    """One command. `boot_id`, `begun`: the boot and its seconds at which it first began; '' and 0: not yet."""

    number: int
    command: Command
    status: CommandStatus
    boot_id: str = ""
    begun: float = 0.0
    tries: int = 0

    @property
    def name(self) -> str:
        return f"{self.number:012d}.{self.command.id}.json"


class CommandStore:
    """Raises MachineError when the disk fails; what was stored before stays."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._done = folder, folder / "done"
        make_folder(self._done, 0o700)

    def load(self) -> tuple[list[Entry], list[Entry]]:
        """(not acknowledged, acknowledged), each in the order of arrival."""
        return self._read_all(self._folder), self._read_all(self._done)

    def write(self, entry: Entry) -> None:
        body = {
            "v": 1,
            "command": encode(entry.command),
            "status": encode(entry.status),
            "boot_id": entry.boot_id,
            "begun": entry.begun,
            "tries": entry.tries,
        }
        write_atomic(self._folder / entry.name, json.dumps(body).encode(), 0o600)

    def set_done(self, entry: Entry) -> None:
        """The server has acknowledged its end. Idempotent."""
        source = self._folder / entry.name
        try:
            DISK.rename(source, self._done / entry.name)
            DISK.sync_folder(self._done)
            DISK.sync_folder(self._folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise failed("move", source, error) from error

    def forget(self, entry: Entry) -> None:
        """Only a memory of what is over: not synced."""
        for folder in (self._folder, self._done):
            with contextlib.suppress(OSError):
                os.unlink(folder / entry.name)

    def _read_all(self, folder: Path) -> list[Entry]:
        paths = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
        return [entry for path in paths if (entry := _read(path)) is not None]


def _read(path: Path) -> Entry | None:
    number = path.name.partition(".")[0]
    try:
        body = json.loads(path.read_bytes())
        command, status = decode(body["command"]), decode(body["status"])
        if isinstance(command, Command) and isinstance(status, CommandStatus) and JOB_ID.match(command.id):
            entry = Entry(
                int(number), command, status, str(body["boot_id"]), float(body["begun"]), int(body["tries"])
            )
            if entry.name == path.name and status.id == command.id:
                return entry
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, InstarError):
        pass
    log.error("the command in %s cannot be read: it is set aside", path)
    with contextlib.suppress(OSError):
        os.replace(path, path.with_suffix(".unreadable"))
    return None
