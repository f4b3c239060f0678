"""The journal on the disk: one file per transaction, appended and synced, record by record."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from instar.core import journal as records
from instar.core.errors import InputError
from instar.core.journal import Begin, Moment, Progress, Reason, Record
from instar.core.modules import PREFIX
from instar.core.transaction import Event, State, Step
from instar.host.clock import Clock
from instar.host.files import DISK, Disk, failed
from instar.host.points import reach

SUFFIX = ".journal"


class Journal:
    """One transaction's file. `progress` is what its records add up to."""

    def __init__(self, path: Path, clock: Clock, disk: Disk, found: list[Record]) -> None:
        self.path, self._clock, self._disk = path, clock, disk
        self.records = found
        self.progress: Progress = records.fold(found)

    def intent(self, step: Step) -> None:
        """Say that `step` is about to be done. On the disk when this returns."""
        self._append(Record("intent", self._now(), step=step.value))

    def outcome(self, step: Step, event: Event, reason: Reason | None, data: dict[str, Any]) -> None:
        self._append(Record("outcome", self._now(), step.value, event.value, reason, data))

    def note(self, data: dict[str, Any], reason: Reason | None = None) -> None:
        self._append(Record("note", self._now(), reason=reason, data=data))

    def _append(self, record: Record) -> None:
        name = f"journal:{record.step or 'note'}:{record.kind}{':' + record.event if record.event else ''}"
        progress = records.fold([*self.records, record])  # refuse what makes no sense before it is written
        reach(f"{name}:before")
        _write(self._disk, self.path, records.encode(record))
        self.records.append(record)
        self.progress = progress
        reach(f"{name}:after")

    def _now(self) -> Moment:
        return moment(self._clock)


class Journals:
    """All transactions of a node. Reads the folder each time: the disk is the truth."""

    def __init__(self, folder: Path, clock: Clock, disk: Disk = DISK) -> None:
        self.folder, self._clock, self._disk = folder, clock, disk

    def begin(self, begin: Begin) -> Journal:
        """Start a transaction's file. Raises MachineError when it cannot be written."""
        path = self.folder / f"{begin.tx}{SUFFIX}"
        record = Record("begin", moment(self._clock), data=begin.as_data())
        reach("journal:begin:before")
        _write(self._disk, path, records.encode(record))
        with contextlib.suppress(OSError):
            self._disk.sync_folder(self.folder)
        reach("journal:begin:after")
        return Journal(path, self._clock, self._disk, [record])

    def open_all(self) -> list[Journal]:
        """Every readable journal, oldest first. A torn tail is cut off; a file that cannot be read is
        renamed to `*.unreadable`, and the node goes on by what `observe` sees."""
        journals = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            journal = self._open(path)
            if journal is not None:
                journals.append(journal)
        return sorted(journals, key=lambda j: j.records[0].at.wall)

    def read_all(self) -> list[Journal]:
        """As `open_all`, but changes nothing: for those who only look."""
        journals = [j for p in self.folder.glob(f"*{SUFFIX}") if (j := self._read(p)[0]) is not None]
        return sorted(journals, key=lambda j: j.records[0].at.wall)

    def read(self, tx: str) -> Journal | None:
        """One transaction's, for those who only look; None where there is none that can be read.
        `tx` must have been checked: it is a part of a file's name."""
        return self._read(self.folder / f"{tx}{SUFFIX}")[0]

    def unfinished(self) -> list[Journal]:
        return [j for j in self.open_all() if not j.progress.finished]

    def newest_generation(self, line: str, digest: str, staged: bool = False) -> int:
        """Of the wishes for which a transaction of this release was begun on this line; 0 for none. `staged`:
        only those count whose bytes have come, or that have ended without them."""
        of_it = [j.progress for j in self.read_all() if j.progress.begin.is_of(line, digest)]
        counted = [p for p in of_it if not staged or p.state is not State.OFFERED]
        return max((progress.begin.generation for progress in counted), default=0)

    def prune(self, keep: int) -> None:
        """Remove the oldest finished journals, so that `keep` of them are left. The newest of each line stays,
        modules' apart: it says which wish was the last that something was begun for."""
        journals = self.open_all()
        newest = {
            j.progress.begin.line: j.path for j in journals if not j.progress.begin.line.startswith(PREFIX)
        }
        finished = [j for j in journals if j.progress.finished]
        for journal in finished[: max(0, len(finished) - keep)]:
            if journal.path in newest.values():
                continue
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(journal.path)

    def _open(self, path: Path) -> Journal | None:
        journal, used, size = self._read(path)
        if journal is None:
            if used < 0:
                os.replace(path, path.with_suffix(".unreadable"))
            else:
                self._disk.unlink(path)  # a power cut tore its first record: nothing was begun
            return None
        if used < size:
            self._disk.truncate(path, used)
        return journal

    def _read(self, path: Path) -> tuple[Journal | None, int, int]:
        """The journal, how many of its bytes are whole (-1: it cannot be read), and its size."""
        try:
            data = path.read_bytes()
            found, used = records.decode(data)
            if not found:
                return None, 0, len(data)
            return Journal(path, self._clock, self._disk, found), used, len(data)
        except (InputError, OSError):
            return None, -1, 0


def moment(clock: Clock) -> Moment:
    return Moment(clock.boot_id(), clock.boottime(), clock.wall())


def _write(disk: Disk, path: Path, data: bytes) -> None:
    size = path.stat().st_size if path.exists() else 0
    try:
        disk.append(path, data, 0o600)
    except OSError as error:
        with contextlib.suppress(OSError):
            disk.truncate(path, size)  # half a record must not come to lie before the next one
        raise failed("write", path, error) from error
