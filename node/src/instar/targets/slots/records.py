"""What is known of each slot, beside what the disk itself says: `<state>/os/slots.json`.

    {"v":1,"slots":{"a":{"version","digest","state","size","done","since","why","booted_by","cold_boot_seen"},…}}

`unknown` is a state of its own: a slot that nobody has written about is neither good nor bad.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from instar.core.errors import InputError
from instar.core.releases import Release
from instar.host.boot.slots import NAMES
from instar.host.files import DISK, Disk, failed, make_folder, write_atomic

STATES = ("unknown", "writing", "installed", "trial", "good", "bad")


class SlotRecord(NamedTuple):
    """`size` is of the root image in bytes, `done` how much of it is on the disk while it is written. `since` is
    unix time, for people. `cold_boot_seen`: this version was started by the firmware, not only by kexec."""

    version: str = ""
    digest: str = ""
    state: str = "unknown"
    size: int = 0
    done: int = 0
    since: float = 0.0
    why: str = ""
    booted_by: str = ""  # firmware | kexec
    cold_boot_seen: bool = False

    @property
    def name(self) -> str:
        """As a release is called; '' where nothing whole is known to lie in the slot."""
        known = self.version and self.digest and self.state != "writing"
        return Release(self.version, self.digest).name if known else ""

    @property
    def usable(self) -> bool:
        """Whether a whole system lies there: installed by us, or the node's first one, which ran when it was noted."""
        return self.state in ("installed", "good") or self.is_first

    @property
    def is_first(self) -> bool:
        """The node's first system, which was noted while it ran."""
        return self.state == "unknown" and bool(self.name)

    @property
    def has_run(self) -> bool:
        return self.state == "good" or self.is_first


def read_records(path: Path) -> dict[str, SlotRecord]:
    """Both slots'. A file whose content makes no sense is set aside: then nothing is known, and nothing believed.

    Raises MachineError where the disk or the system cannot read it now: that says nothing about what is in it."""
    nothing = {name: SlotRecord() for name in NAMES}
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return nothing
    except OSError as error:
        raise failed("read", path, error) from error
    try:
        body = json.loads(data)["slots"]
        return nothing | {name: _record(body[name]) for name in NAMES if name in body}
    except (ValueError, KeyError, TypeError, AttributeError, InputError, RecursionError):
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".unreadable"))
        return nothing


def _record(fields: Mapping[str, object]) -> SlotRecord:
    record = SlotRecord(**{name: fields[name] for name in SlotRecord._fields if name in fields})  # type: ignore[arg-type]
    for name, default in SlotRecord._field_defaults.items():
        if type(getattr(record, name)) not in (type(default), int if name == "since" else type(default)):
            raise ValueError(f"{name}: {getattr(record, name)!r}")
    if record.state not in STATES:
        raise ValueError(record.state)
    return record


def write_records(path: Path, records: Mapping[str, SlotRecord], disk: Disk = DISK) -> None:
    make_folder(path.parent, 0o700, disk)
    body = {"v": 1, "slots": {name: record._asdict() for name, record in records.items()}}
    write_atomic(path, json.dumps(body).encode(), 0o600, disk)
