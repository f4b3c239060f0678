"""The journal's records: one line of bytes each, and the progress that a list of them adds up to.

A line is `<CRC-32 of the rest, 8 hex digits> <JSON>\\n`. The last line may be torn by a power cut and
is then dropped; a bad line before it makes the journal unreadable. `v` is the schema's version:
a journal of a newer version is unreadable to us, never guessed at. A field that a newer release has added
within the same version is passed over: an older release must be able to go on with what a newer one began.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from instar.core.errors import InputError
from instar.core.reason import Reason as Reason  # noqa: PLC0414 - part of a record, and imported from here
from instar.core.releases import Release
from instar.core.transaction import FINAL, STEP, Event, State, Step, after

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Moment:
    """When a record was written: boot time for reckoning, wall time (unix) for people."""

    boot_id: str
    boottime: float
    wall: float


@dataclass(frozen=True, slots=True)
class Begin:
    """The transaction's fixed facts. `target` is a TUF path; '' for a way back to a release on the disk.

    `origin` is the name of the release that runs when it begins, and that a revert restores; `fallback`
    is what `previous` points to then.
    """

    tx: str
    line: str
    version: str
    digest: str
    target: str
    origin: str
    fallback: str
    cause: str  # wish | rollback | push | recovery | cold-boot
    generation: int = 0
    via: str = ""  # native | push | recovery: how the bytes come; '' for fetching them
    mode: str = ""  # none | reboot | kexec: how a system image is activated; '' for the other lines
    source: str = ""  # the https URL that a system image's bytes come from; '' for the server
    override: bool = False  # write a slot also while the running system's cold boot has not been seen

    @property
    def release(self) -> Release:
        return Release(self.version, self.digest)

    def is_of(self, line: str, digest: str) -> bool:
        return (self.line, self.digest) == (line, digest)

    @property
    def anew(self) -> bool:
        """Whether it puts the very release there that is there already, since that is damaged or asked for."""
        return self.origin == self.release.name

    @property
    def forced(self) -> bool:
        """Whether it puts a release there anew that may well be sound: it has come through the channel again, by a
        wish that this node takes whatever it runs. What is damaged is fetched, so `via` tells the two apart."""
        return self.anew and self.via == "native"

    @property
    def way_back(self) -> str:
        """The name of the release that ran before; for one that is put there anew, of that before it."""
        return (self.fallback or self.origin) if self.anew else self.origin

    def as_data(self) -> dict[str, Any]:
        """For the first record. A later field that says nothing is left out: releases that do not know it
        took no unknown ones either."""
        said = asdict(self)
        return {name: value for name, value in said.items() if value or name not in LATER}


LATER = ("via", "mode", "source", "override")


@dataclass(frozen=True, slots=True)
class Record:
    """One line. `kind` is begin, intent, outcome or note."""

    kind: str
    at: Moment
    step: str = ""
    event: str = ""
    reason: Reason | None = None
    data: dict[str, Any] = field(default_factory=dict)


def encode(record: Record) -> bytes:
    body = {"v": SCHEMA, **asdict(record)}
    text = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode_line(line: bytes) -> Record:
    """One whole line without its newline. Raises InputError `bad-record`."""
    try:
        if not _is_whole(line):
            raise ValueError("its checksum does not fit")
        body = json.loads(line[9:])
        if body["v"] != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}, got {body['v']}")
        reason = body["reason"]
        return Record(
            kind=body["kind"],
            at=_known(Moment, body["at"]),
            step=body["step"],
            event=body["event"],
            reason=Reason(str(reason["code"]), str(reason["text"])) if reason else None,
            data=dict(body["data"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("bad-record", f"cannot read a journal record: {error}") from None


T = TypeVar("T")


def _known(kind: type[T], said: Any) -> T:
    """One of `kind`, from the fields that it has; what else is said is passed over."""
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in said.items() if name in names})


def _is_whole(line: bytes) -> bool:
    """Whether the checksum fits. A whole line that cannot be read is no torn one: it is of a newer schema."""
    try:
        return line[8:9] == b" " and int(line[:8], 16) == zlib.crc32(line[9:])
    except ValueError:
        return False


def decode(data: bytes) -> tuple[list[Record], int]:
    """All whole records, and how many bytes of `data` they take; a torn last line is left out.

    Raises InputError `bad-record` when a record that is not the last cannot be read.
    """
    records: list[Record] = []
    used = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1]):
        try:
            records.append(decode_line(line))
        except InputError:
            if number == len(lines) - 2 and not lines[-1] and not _is_whole(line):
                break  # the last line, newline and all, was torn in its middle
            raise
        used += len(line) + 1
    return records, used


@dataclass(slots=True)
class Progress:
    """Where a transaction stands: the sum of its records."""

    begin: Begin
    began: Moment
    state: State = State.OFFERED
    reason: Reason | None = None
    tries: dict[Step, int] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    changed: Moment | None = None  # when the state was reached

    @property
    def finished(self) -> bool:
        return self.state in FINAL

    @property
    def step(self) -> Step:
        return STEP[self.state]

    def intended(self, step: Step) -> bool:
        """Whether `step` was ever begun: its effect may be there, or half there."""
        return self.tries.get(step, 0) > 0


def fold(records: list[Record]) -> Progress:
    """Add the records up. Raises InputError `bad-journal` when they do not make a transaction."""
    try:
        progress = Progress(_known(Begin, records[0].data), records[0].at, changed=records[0].at)
        if records[0].kind != "begin":
            raise ValueError(f"expected begin first, got {records[0].kind}")
        for record in records[1:]:
            _apply(progress, record)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError("bad-journal", f"cannot read a journal: {error}") from None
    return progress


def _apply(progress: Progress, record: Record) -> None:
    progress.data.update({k: v for k, v in record.data.items() if k != "again"})
    if record.kind == "note":
        if again := record.data.get("again"):  # a passing fault stopped this step: that try does not count
            progress.tries[Step(again)] = max(0, progress.tries.get(Step(again), 0) - 1)
        return
    step = Step(record.step)
    if step is not progress.step:
        raise ValueError(f"expected step {progress.step.value}, got {step.value}")
    if record.kind == "intent":
        progress.tries[step] = progress.tries.get(step, 0) + 1
    elif record.kind == "outcome":
        state = after(progress.state, Event(record.event))
        if state is State.REVERTING and progress.reason is None:
            progress.reason = record.reason  # the first failure is the reason; later ones are noise
        progress.state, progress.changed = state, record.at
    else:
        raise ValueError(f"expected intent, outcome or note, got {record.kind}")


@dataclass(frozen=True, slots=True)
class Change:
    """One change of state: the record's number in its journal, the state reached, when, and why."""

    number: int
    state: State
    at: Moment
    reason: Reason | None


def timeline(records: list[Record]) -> list[Change]:
    """A transaction's changes of state, from offered on, with the notes that carry a reason between them."""
    progress = fold(records[:1])
    changes = [Change(0, progress.state, records[0].at, None)]
    for number, record in enumerate(records[1:], start=1):
        state = progress.state
        _apply(progress, record)
        if progress.state is not state or (record.kind == "note" and record.reason):
            changes.append(Change(number, progress.state, record.at, record.reason))
    return changes
