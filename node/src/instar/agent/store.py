"""Jobs and results that outlive this process, and those that need not.

    jobs/inbox/<number>.<id>.json     received, not started; the number keeps the order
    jobs/running/<number>.<id>.json   started; one without a result that is found at start-up was interrupted
    jobs/outbox/<id>.json             its result; kept until the server has acknowledged it
    jobs/done/<id>.json               acknowledged; the newest KEPT of them, so that a late repeat is known
    jobs/spare/                       files of zeros for the next jobs (spares.py)

A file holds lines: the job's frame as on the wire, `{"received": <unix time>}`, and once there is one the
result's frame; zeros behind them are no part of it. The result is what counts, wherever the file lies.
A file with the frame alone, as older agents wrote it, is good. One that cannot be read is set aside as
`.unreadable`. So a job with an id runs at most once, and its result is sent at least once.

What is synced, and what for (a kill needs none of it, a power cut all):

    receive   the file, then inbox/         before `taken` is sent: the server does not send it again. Written
                                            over a spare, whose name is on the disk already, the file alone
    start     running/                      before the module runs: it is not run a second time. The rename is
                                            one change; were both names found, the one in running/ counts.
                                            A job that is begun at once has that in its file from the first, as
                                            `{"soon": <boot>}`: after a power cut, in another boot, it counts
                                            as begun, and no more is synced. In the same boot its place counts
    finish    the file, to which the result is added     before the result is sent: it never changes any more.
                                            The move to outbox/ is for people, and for quick looks: not synced
    ack       nothing: a move to done/ that is lost costs one more sending of a stored result
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from instar.agent.spares import SIZE, Spares, in_a_thread
from instar.core.errors import InputError, InstarError, MachineError
from instar.host.files import DISK, Disk, failed, make_folder, write_atomic
from instar.host.points import reach
from instar.wire.codec import decode, encode
from instar.wire.messages import Job, Result

KEPT = 256  # acknowledged results that are remembered
MOST_HELD = 256  # jobs and unacknowledged results together
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")  # also a file name
ENDED = "cannot finish job: the agent ended while it ran; it is not run again"


class Waiting(NamedTuple):
    """A job that has not been started. `received` is unix time, 0 when nobody noted it."""

    job: Job
    received: float


class Store(Protocol):
    """Every method is idempotent. `known` is true from `receive` on, for as long as the store remembers."""

    def known(self, job_id: str) -> bool: ...
    def receive(self, job: Job, soon: bool = False) -> None: ...  # `soon`: `start` follows at once
    def start(self, job_id: str) -> None: ...
    def finish(self, result: Result) -> None: ...
    def acknowledged(self, job_id: str) -> None: ...
    def result(self, job_id: str) -> Result | None: ...
    def unacknowledged(self) -> list[str]: ...
    def held(self) -> int: ...


class MemoryStore:
    """For jobs whose repetition does no harm (rehearsal, health): nothing is written."""

    def __init__(self) -> None:
        self._open: dict[str, Result | None] = {}
        self._done: dict[str, None] = {}

    def known(self, job_id: str) -> bool:
        return job_id in self._open or job_id in self._done

    def receive(self, job: Job, soon: bool = False) -> None:
        self._open[job.id] = None

    def start(self, job_id: str) -> None:
        pass

    def finish(self, result: Result) -> None:
        self._open[result.id] = result

    def acknowledged(self, job_id: str) -> None:
        if self._open.get(job_id) is not None:
            del self._open[job_id]
            self._done[job_id] = None
            while len(self._done) > KEPT:
                del self._done[next(iter(self._done))]

    def result(self, job_id: str) -> Result | None:
        return self._open.get(job_id)

    def unacknowledged(self) -> list[str]:
        return [job_id for job_id, result in self._open.items() if result is not None]

    def held(self) -> int:
        return len(self._open)


class Entry(NamedTuple):
    """What a file holds. `frame` is its first line; an old outbox file has the result there."""

    frame: Job | Result
    received: float
    result: Result | None
    soon: str = ""  # the boot in which it was to be begun at once


class DiskStore:
    """The durable one. Raises MachineError when the disk fails; what was stored before stays.

    `wall` is unix time, for when a job was received. `boot_id` '': not known. `apart` runs what need not
    be waited for.
    """

    def __init__(
        self,
        folder: Path,
        wall: Callable[[], float] = time.time,
        disk: Disk = DISK,
        boot_id: str = "",
        apart: Callable[[Callable[[], None]], None] = in_a_thread,
    ) -> None:
        self._folder, self._wall, self._disk, self._boot_id = folder, wall, disk, boot_id
        for name in ("inbox", "running", "outbox", "done"):
            make_folder(folder / name, 0o700, disk)
        self._inbox = self._by_number("inbox")
        self._running = self._by_number("running")
        self._outbox = self._by_age("outbox")
        self._done = self._by_age("done")
        self._unwritten: dict[str, Result] = {}
        self._soon: set[str] = set()
        self._used: dict[str, int] = {}  # of those that are in what was a spare: bytes that are written
        self._spares = Spares(folder / "spare", disk, apart)
        numbers = [int(path.name.split(".")[0]) for path in (*self._inbox.values(), *self._running.values())]
        self._next = max(numbers, default=0) + 1
        self._forget_old()

    def recover(self) -> list[Waiting]:
        """Once, at start-up: end what was interrupted, return what waits, in the order of arrival."""
        self._take_in_spares()
        self._drop_doubles()
        for job_id, path in list(self._running.items()):
            entry = self._read(path, job_id)
            if entry is None:
                del self._running[job_id]
            elif entry.result is not None:
                self._settle(job_id)
            else:
                self._interrupted(job_id)
        waiting = []
        for job_id, path in list(self._inbox.items()):
            entry = self._read(path, job_id)
            if entry is None:
                del self._inbox[job_id]
            elif entry.result is not None:
                self._settle(job_id)
            elif entry.soon and entry.soon != self._boot_id:
                self._interrupted(job_id)
            elif isinstance(entry.frame, Job):
                waiting.append(Waiting(entry.frame, entry.received))
        return waiting

    def known(self, job_id: str) -> bool:
        places = (self._inbox, self._running, self._outbox, self._done, self._unwritten)
        return any(job_id in place for place in places)

    def receive(self, job: Job, soon: bool = False) -> None:
        path = self._folder / "inbox" / f"{self._next:012d}.{job.id}.json"
        note: dict[str, Any] = {"received": round(self._wall(), 3)}
        if soon and self._boot_id:
            note["soon"] = self._boot_id
        data = f"{encode(job)}\n{json.dumps(note)}\n".encode()
        spare = self._spares.take(len(data))
        if spare is None:
            write_atomic(path, data, 0o600, self._disk)
        else:
            self._write_over(spare, data, path)
            self._used[job.id] = len(data)
        if "soon" in note:
            self._soon.add(job.id)
        self._next += 1
        self._inbox[job.id] = path
        reach("job:received")

    def _write_over(self, spare: Path, data: bytes, path: Path) -> None:
        try:
            self._disk.write_over(spare, data, 0)
            self._disk.rename(spare, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._disk.unlink(spare)
            raise failed("write", path, error) from error

    def start(self, job_id: str) -> None:
        old = self._inbox.get(job_id)
        if old is None:
            return
        new = self._folder / "running" / old.name
        try:
            self._disk.rename(old, new)
            if job_id not in self._soon:
                self._disk.sync_folder(new.parent)
        except OSError as error:
            raise failed("move", old, error) from error
        self._soon.discard(job_id)
        self._running[job_id] = new
        del self._inbox[job_id]
        reach("job:started")

    def finish(self, result: Result) -> None:
        """A result that the disk has no room for is kept in memory, sent, and the error raised all the same."""
        path = self._running.get(result.id) or self._inbox.get(result.id)
        self._soon.discard(result.id)
        line = f"\n{encode(result)}\n".encode()  # what an earlier write left half done ends here
        try:
            if path is None:  # cancelled before it came
                path = self._folder / "outbox" / f"{result.id}.json"
                write_atomic(path, line, 0o600, self._disk)
                self._outbox[result.id] = path
            else:
                self._add(path, line, self._used.pop(result.id, SIZE))
        except (OSError, MachineError) as error:
            self._unwritten[result.id] = result
            if isinstance(error, OSError):
                raise failed("write", path or self._folder, error) from error
            raise
        reach("job:finished")
        self._settle(result.id)

    def _add(self, path: Path, line: bytes, used: int) -> None:
        if used + len(line) <= SIZE:
            self._disk.write_over(path, line, used)
        else:
            self._disk.append(path, line, 0o600)

    def acknowledged(self, job_id: str) -> None:
        path = self._outbox.get(job_id) or self._running.get(job_id) or self._inbox.get(job_id)
        if path is None or not (job_id in self._outbox or job_id in self._unwritten):
            return
        done = self._folder / "done" / f"{job_id}.json"
        try:
            self._disk.rename(path, done)
        except FileNotFoundError:
            pass  # a person tidied up
        except OSError as error:
            raise failed("move", path, error) from error
        for place in (self._outbox, self._running, self._inbox, self._unwritten):
            place.pop(job_id, None)
        self._done[job_id] = done
        reach("job:acked")
        self._forget_old()

    def result(self, job_id: str) -> Result | None:
        path = self._outbox.get(job_id)
        if path is None:
            return self._unwritten.get(job_id)
        entry = self._read(path, job_id)
        if entry is None or entry.result is None:
            del self._outbox[job_id]
            return None
        return entry.result

    def unacknowledged(self) -> list[str]:
        return [*self._outbox, *self._unwritten]

    def held(self) -> int:
        return len(self._inbox) + len(self._running) + len(self._outbox)

    def _interrupted(self, job_id: str) -> None:
        with contextlib.suppress(MachineError):  # a full disk must not keep the agent from starting
            self.finish(Result(job_id, ok=False, reason=ENDED, code="interrupted"))

    def _take_in_spares(self) -> None:
        """After a power cut, a job may lie where its spare was; after a kill, a spare that nobody uses."""
        for path in self._spares.found():
            entry = None
            with contextlib.suppress(OSError):
                entry = _parse(path.read_bytes())
            with contextlib.suppress(OSError):
                if entry is None or not JOB_ID.match(entry.frame.id) or self.known(entry.frame.id):
                    self._disk.unlink(path)
                    continue
                new = self._folder / "inbox" / f"{self._next:012d}.{entry.frame.id}.json"
                self._disk.rename(path, new)
                self._inbox[entry.frame.id] = new
                self._next += 1

    def _settle(self, job_id: str) -> None:
        """Its result is on the disk: show that by where the file lies."""
        old = self._running.pop(job_id, None) or self._inbox.pop(job_id, None)
        if old is None:
            return
        new = self._folder / "outbox" / f"{job_id}.json"
        try:
            self._disk.rename(old, new)
        except OSError:  # no room for the name: it counts where it is
            new = old
        self._outbox[job_id] = new

    def _drop_doubles(self) -> None:
        """Of a job found in two places, the later place counts: older agents wrote first and removed then."""
        for place, later in (
            (self._outbox, (self._done,)),
            (self._running, (self._outbox, self._done)),
            (self._inbox, (self._running, self._outbox, self._done)),
        ):
            for job_id in [name for name in place if any(name in after for after in later)]:
                with contextlib.suppress(OSError):
                    self._disk.unlink(place[job_id])
                del place[job_id]

    def _forget_old(self) -> None:
        while len(self._done) > KEPT:
            job_id = next(iter(self._done))
            with contextlib.suppress(OSError):  # only a memory of what is over
                self._disk.unlink(self._done[job_id])
            del self._done[job_id]

    def _by_number(self, folder: str) -> dict[str, Path]:
        """Job id → file, in the order of arrival. What a write left half done is removed."""
        found = {}
        for name in sorted(os.listdir(self._folder / folder)):
            number, _, rest = name.partition(".")
            job_id = rest.removesuffix(".json")
            if number.isdigit() and rest.endswith(".json") and JOB_ID.match(job_id):
                found[job_id] = self._folder / folder / name
            elif name.startswith(".") and name.endswith(".new"):
                with contextlib.suppress(OSError):
                    self._disk.unlink(self._folder / folder / name)
        return found

    def _by_age(self, folder: str) -> dict[str, Path]:
        paths = [p for p in (self._folder / folder).glob("*.json") if JOB_ID.match(p.stem)]
        return {p.stem: p for p in sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name))}

    def _read(self, path: Path, job_id: str) -> Entry | None:
        """What `path` holds about `job_id`; None, and the file set aside, when that is nothing."""
        try:
            entry = _parse(path.read_bytes())
            if entry is not None and entry.frame.id == job_id:
                return entry
        except OSError:
            pass
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".unreadable"))
        return None


def _parse(data: bytes) -> Entry | None:
    """A line that was torn is no JSON object, and so says nothing."""
    first, *others = data.strip(b"\n\0").split(b"\n")
    frame = _frame(first)
    if frame is None:
        return None
    received, soon, result = 0.0, "", frame if isinstance(frame, Result) else None
    for line in others:
        found = _frame(line)
        if isinstance(found, Result) and found.id == frame.id:
            result = result or found
        elif found is None and not received:
            received, soon = _note(line)
    return Entry(frame, received, result, soon)


def _frame(line: bytes) -> Job | Result | None:
    try:
        found = decode(line)
    except InstarError:
        return None
    return found if isinstance(found, (Job, Result)) else None


def _note(line: bytes) -> tuple[float, str]:
    """When it was received, and in which boot it was to be begun at once."""
    try:
        note = json.loads(line)
        return float(note["received"]), str(note.get("soon", ""))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return 0.0, ""


def check_job_id(job_id: str) -> None:
    if not JOB_ID.match(job_id):
        form = "an id of at most 64 letters, digits, '.', '_', '-'"
        text = f"cannot take job: expected {form}, got {job_id!a:.80}"
        raise InputError("bad-job-id", text)
