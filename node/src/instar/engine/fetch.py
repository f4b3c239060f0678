"""Fetch a file by ranges: resumed after a cut, capped in rate, bounded in space, time and tries."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from instar.core.backoff import Backoff
from instar.core.errors import MachineError, ServerUnreachable, TrustError
from instar.host.files import failed

SYNC_EVERY = 4 * 1024 * 1024


class Source(Protocol):
    """What `instar.host.transport.Transport.stream` offers."""

    def stream(
        self, path: str, start: int, stop: int | None = None
    ) -> AbstractContextManager[tuple[bool, Iterator[bytes]]]: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """`rate_bytes_s` 0 means no cap. `tries` counts cuts without a byte of progress between them."""

    rate_bytes_s: int = 0
    tries: int = 8
    deadline_s: float = 3600.0
    retry_floor_s: float = 0.2
    retry_cap_s: float = 30.0


class Pace:
    """Keeps the mean rate at or below a cap by waiting after each chunk."""

    def __init__(self, rate_bytes_s: int, now: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._rate, self._now, self._sleep = rate_bytes_s, now, sleep
        self._free_at = now()

    def spend(self, count: int) -> None:
        if not self._rate:
            return
        self._free_at = max(self._free_at, self._now()) + count / self._rate
        wait = self._free_at - self._now()
        if wait > 0:
            self._sleep(wait)


def fetch(
    source: Source,
    path: str,
    into: Path,
    length: int,
    limits: Limits,
    progress: Callable[[int], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Bring exactly `length` bytes of `path` to `into`, going on from what is there already.

    The bytes are on the disk when this returns; whether they are the right ones is for the caller to
    check. Raises ServerUnreachable when the tries or the time are used up (what came is kept, for the
    next call), TrustError `longer-than-signed`, MachineError when the disk fails.
    """
    end = now() + limits.deadline_s
    backoff = Backoff(limits.retry_floor_s, 2.0, limits.retry_cap_s)
    pace = Pace(limits.rate_bytes_s, now, sleep)
    tries = 0
    while (have := _size(into)) < length:
        try:
            _more(source, path, into, length, pace, progress, lambda: now() > end)
        except ServerUnreachable as error:
            if _size(into) > have:
                tries = 0
                backoff.reset()
            tries += 1
            if tries >= limits.tries or now() > end:
                raise ServerUnreachable(
                    error.code, f"{error.text} ({_size(into)} of {length} bytes)"
                ) from None
            sleep(backoff.next(random.random()))
    if have > length:
        into.unlink()
        raise TrustError("longer-than-signed", f"cannot use {path}: expected {length} bytes, got more")


def _more(
    source: Source,
    path: str,
    into: Path,
    length: int,
    pace: Pace,
    progress: Callable[[int], None],
    late: Callable[[], bool],
) -> None:
    have = _size(into)
    with source.stream(path, have) as (resumed, chunks):
        if have and not resumed:
            have = 0
        try:
            fd = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise failed("write", into, error) from error
        try:
            os.ftruncate(fd, have)
            os.lseek(fd, have, os.SEEK_SET)
            have = _write(fd, chunks, have, length, path, pace, progress, late)
            os.fsync(fd)
        except OSError as error:
            raise failed("write", into, error) from error
        finally:
            os.close(fd)
    if have < length:
        raise ServerUnreachable("cut-off", f"cannot read {path} on: it ended early")


def _write(
    fd: int,
    chunks: Iterator[bytes],
    have: int,
    length: int,
    path: str,
    pace: Pace,
    progress: Callable[[int], None],
    late: Callable[[], bool],
) -> int:
    synced = have
    for chunk in chunks:
        have += len(chunk)
        if have > length:  # never hold more than was signed: an endless answer must not fill the disk
            os.ftruncate(fd, 0)
            text = f"cannot use {path}: expected {length} bytes, got at least {have}"
            raise TrustError("longer-than-signed", text)
        view = memoryview(chunk)
        while view:
            view = view[os.write(fd, view) :]
        if have - synced >= SYNC_EVERY:
            os.fsync(fd)
            synced = have
        progress(have)
        pace.spend(len(chunk))
        if late():
            raise ServerUnreachable("too-slow", f"cannot fetch {path} in time")
    return have


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise MachineError("disk-failed", f"cannot look at {path}: {error}") from None
