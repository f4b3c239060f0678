"""Jobs and results that outlive this process, and those that need not.

    jobs/inbox/<number>.<id>.json     received, not started; the number keeps the order
    jobs/running/<number>.<id>.json   started; found at start-up, it was interrupted and is not run again
    jobs/outbox/<id>.json             its result; kept until the server has acknowledged it
    jobs/done/<id>.json               acknowledged; the newest KEPT of them, so that a late repeat is known

Each file holds one frame, as on the wire. A file that cannot be read is set aside as `.unreadable`.
So a job with an id runs at most once, and its result is sent at least once.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Protocol

from instar.core.errors import InputError, InstarError
from instar.host.files import DISK, failed, make_folder, remove, write_atomic
from instar.host.points import reach
from instar.wire.codec import decode, encode
from instar.wire.messages import Job, Result

KEPT = 256  # acknowledged results that are remembered
MOST_HELD = 256  # jobs and unacknowledged results together
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")  # also a file name


class Store(Protocol):
    """Every method is idempotent. `known` is true from `receive` on, for as long as the store remembers."""

    def known(self, job_id: str) -> bool: ...
    def receive(self, job: Job) -> None: ...
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

    def receive(self, job: Job) -> None:
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


class DiskStore:
    """The durable one. Raises MachineError when the disk fails; what was stored before stays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("inbox", "running", "outbox", "done"):
            make_folder(folder / name, 0o700)
        self._inbox = self._names("inbox")
        self._running = self._names("running")
        self._outbox = [path.stem for path in self._by_age("outbox")]
        self._done = [path.stem for path in self._by_age("done")]
        numbers = [int(name.split(".")[0]) for name in (*self._inbox.values(), *self._running.values())]
        self._next = max(numbers, default=0) + 1
        self._forget_old()

    def recover(self) -> list[Job]:
        """Once, at start-up: end what was interrupted, return what waits, in the order of arrival."""
        for job_id, name in list(self._running.items()):
            if job_id in self._outbox:  # killed between writing the result and removing the job
                self._drop_job(job_id)
                continue
            found = self._read(self._folder / "running" / name)
            if found is None:
                del self._running[job_id]
            else:
                reason = "cannot finish job: the agent ended while it ran; it is not run again"
                self.finish(Result(job_id, ok=False, reason=reason))
        jobs = []
        for job_id, name in list(self._inbox.items()):
            job = self._read(self._folder / "inbox" / name)
            if isinstance(job, Job) and job.id == job_id:
                jobs.append(job)
            else:
                del self._inbox[job_id]
        return jobs

    def known(self, job_id: str) -> bool:
        return any(job_id in place for place in (self._inbox, self._running, self._outbox, self._done))

    def receive(self, job: Job) -> None:
        name = f"{self._next:012d}.{job.id}.json"
        write_atomic(self._folder / "inbox" / name, encode(job).encode(), 0o600)
        self._next += 1
        self._inbox[job.id] = name
        reach("job:received")

    def start(self, job_id: str) -> None:
        name = self._inbox[job_id]
        self._move(f"inbox/{name}", f"running/{name}")
        self._running[job_id] = self._inbox.pop(job_id)
        reach("job:started")

    def finish(self, result: Result) -> None:
        write_atomic(self._folder / "outbox" / f"{result.id}.json", encode(result).encode(), 0o600)
        if result.id not in self._outbox:
            self._outbox.append(result.id)
        reach("job:finished")
        self._drop_job(result.id)

    def acknowledged(self, job_id: str) -> None:
        if job_id in self._outbox:
            self._move(f"outbox/{job_id}.json", f"done/{job_id}.json")
            self._outbox.remove(job_id)
            self._done.append(job_id)
            self._forget_old()

    def result(self, job_id: str) -> Result | None:
        if job_id not in self._outbox:
            return None
        found = self._read(self._folder / "outbox" / f"{job_id}.json")
        if isinstance(found, Result):
            return found
        self._outbox.remove(job_id)
        return None

    def unacknowledged(self) -> list[str]:
        return list(self._outbox)

    def held(self) -> int:
        return len(self._inbox) + len(self._running) + len(self._outbox)

    def _drop_job(self, job_id: str) -> None:
        for folder, names in (("running", self._running), ("inbox", self._inbox)):
            name = names.pop(job_id, None)
            if name is not None:
                remove(self._folder / folder / name)

    def _forget_old(self) -> None:
        while len(self._done) > KEPT:
            with contextlib.suppress(OSError):  # only a memory of what is over
                os.unlink(self._folder / "done" / f"{self._done[0]}.json")
            del self._done[0]

    def _move(self, old: str, new: str) -> None:
        source, target = self._folder / old, self._folder / new
        try:
            DISK.rename(source, target)
            DISK.sync_folder(target.parent)
            DISK.sync_folder(source.parent)
        except OSError as error:
            raise failed("move", source, error) from error

    def _names(self, folder: str) -> dict[str, str]:
        """Job id → file name, in the order of arrival."""
        found = {}
        for name in sorted(os.listdir(self._folder / folder)):
            number, _, rest = name.partition(".")
            job_id = rest.removesuffix(".json")
            if number.isdigit() and rest.endswith(".json") and JOB_ID.match(job_id):
                found[job_id] = name
        return found

    def _by_age(self, folder: str) -> list[Path]:
        paths = [p for p in (self._folder / folder).glob("*.json") if JOB_ID.match(p.stem)]
        return sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name))

    def _read(self, path: Path) -> Job | Result | None:
        try:
            found = decode(path.read_bytes())
            if isinstance(found, (Job, Result)):
                return found
        except (OSError, InstarError):
            pass
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".unreadable"))
        return None


def check_job_id(job_id: str) -> None:
    if not JOB_ID.match(job_id):
        form = "an id of at most 64 letters, digits, '.', '_', '-'"
        text = f"cannot take job: expected {form}, got {job_id!a:.80}"
        raise InputError("bad-job-id", text)
