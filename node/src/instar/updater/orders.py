"""What other threads leave for the loop, and what they may know of what it does now.

The local API and the HTTP API order; the loop alone takes orders and drives. One at a time: an order that
comes while a transaction is under way, or another order waits, is refused with `busy`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from instar.core.errors import InputError


class Pushed(NamedTuple):
    """A release whose parcel lies whole in `incoming`, to be installed (requirement D1).

    `tx` is the transaction's name to be, as it was told to whoever pushed. `generation_floor` is the newest
    wish for the line that the push goes against, if that is known: the loop takes what it has heard itself.
    """

    tx: str
    line: str
    version: str
    digest: str
    target: str
    generation_floor: int = 0


class Doing(NamedTuple):
    """What is done now: `tx` '' for nothing. `phase` is a step of docs/transaction.md; `done` and `total`
    are bytes of what is being brought here, 0 of 0 where none is."""

    tx: str = ""
    phase: str = ""
    done: int = 0
    total: int = 0


IDLE = Doing()


@dataclass(slots=True)
class Orders:
    """Fields are read and set under `lock`; the methods take it themselves. `wake` ends the loop's wait."""

    lock: threading.Lock
    wake: threading.Event
    rollback: str = ""  # the line to roll back
    pushed: Pushed | None = None
    busy: str = ""  # the transaction being driven
    progress: Doing = IDLE
    receiving: Doing = IDLE  # a push whose body is on its way; nothing else may be ordered meanwhile
    receiving_line: str = ""
    changes: int = 0  # grows with each change of `busy`, `progress`, `receiving` or what waits
    _changed: threading.Condition = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._changed = threading.Condition(self.lock)

    # --- for whoever orders

    def order_rollback(self, line: str) -> None:
        """Raises InputError `busy`."""
        with self.lock:
            self._refuse_busy(f"roll back the {line}")
            self.rollback = line
            self._tell()
        self.wake.set()

    def reserve(self, tx: str, line: str, total: int) -> None:
        """The next order is `tx`, whose parcel of `total` bytes comes now. `order_push` or `give_up` must
        follow. Raises InputError `busy`."""
        with self.lock:
            self._refuse_busy(f"push a release of the {line}")
            self.receiving, self.receiving_line = Doing(tx, "receive", 0, total), line
            self._tell()

    def received(self, done: int) -> None:
        """Bytes of the push that have come."""
        with self.lock:
            self.receiving = self.receiving._replace(done=done)
            self._tell()

    def give_up(self, tx: str) -> None:
        """Nothing came of a push that was reserved. Idempotent."""
        with self.lock:
            if self.receiving.tx == tx:
                self.receiving = IDLE
                self._tell()

    def order_push(self, pushed: Pushed) -> None:
        """Its parcel must be whole. One that was reserved waits for what the loop may have begun meanwhile;
        another raises InputError `busy`."""
        with self.lock:
            if self.receiving.tx == pushed.tx:
                self.receiving = IDLE
            else:
                self._refuse_busy(f"push a release of the {pushed.line}")
            self.pushed = pushed
            self._tell()
        self.wake.set()

    def doing(self) -> Doing:
        with self.lock:
            return self.progress

    def under_way(self) -> str:
        """The transaction that is driven, or is to be; the rollback that waits has no name yet: 'rollback'."""
        with self.lock:
            return self._under_way()

    def wait_past(self, changes: int, timeout_s: float) -> int:
        """Wait until `changes` is no longer the number of changes, at most `timeout_s`; what it is now."""
        with self._changed:
            self._changed.wait_for(lambda: self.changes != changes, timeout_s)
            return self.changes

    # --- for the loop

    def take_rollback(self) -> str:
        with self.lock:
            line, self.rollback = self.rollback, ""
            return line

    def take_pushed(self) -> Pushed | None:
        """It counts as under way from now on: `end` must follow."""
        with self.lock:
            pushed, self.pushed = self.pushed, None
            if pushed is not None:
                self.busy, self.progress = pushed.tx, Doing(pushed.tx, "stage")
            return pushed

    def leave_again(self, pushed: Pushed) -> None:
        """It could not be begun."""
        with self.lock:
            self.pushed = pushed
            self._tell()

    @contextmanager
    def idle(self) -> Iterator[bool]:
        """Whether nothing is under way; while this lasts, nothing can be ordered either."""
        with self.lock:
            yield not self._under_way()

    def waiting(self) -> bool:
        """Whether an order waits to be taken."""
        with self.lock:
            return bool(self.rollback or self.pushed)

    def begin(self, tx: str, phase: str) -> None:
        with self.lock:
            self.busy, self.progress = tx, Doing(tx, phase)
            self._tell()

    def reached(self, phase: str) -> None:
        """The transaction under way goes on with another step."""
        with self.lock:
            self.progress = Doing(self.busy, phase)
            self._tell()

    def brought(self, done: int, total: int) -> None:
        """Bytes that have come, of so many."""
        with self.lock:
            self.progress = self.progress._replace(done=done, total=total)
            self._tell()

    def end(self) -> None:
        with self.lock:
            self.busy, self.progress = "", IDLE
            self._tell()

    # --- under the lock

    def _under_way(self) -> str:
        waits = (self.pushed.tx if self.pushed else "") or ("rollback" if self.rollback else "")
        return self.busy or self.receiving.tx or waits

    def _refuse_busy(self, doing: str) -> None:
        if other := self._under_way():
            raise InputError("busy", f"cannot {doing}: transaction {other} is under way")

    def _tell(self) -> None:
        self.changes += 1
        self._changed.notify_all()
