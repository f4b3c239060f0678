"""What other threads leave for the loop, and what they may know of what it does now.

The local API and the HTTP API order; the loop alone takes orders and drives. One at a time: an order that
comes while a transaction is under way, or another order waits, is refused with `busy`.

What was accepted is on the disk before whoever ordered is told so, and stays there until the journal has it:
the next updater takes it up when this one is killed, or hands over to another release.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from instar.core.errors import InputError, MachineError
from instar.core.system import MODES
from instar.host.files import remove, write_atomic
from instar.host.layout import LINES

log = logging.getLogger("instar.updater")


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


class Updating(NamedTuple):
    """A system image that an operator wants in the other slot. `mode` says how it is activated; `source` is an https
    URL, '' for the server."""

    tx: str
    version: str
    digest: str
    target: str
    mode: str
    source: str = ""
    override: bool = False

    def facts(self) -> dict[str, Any]:
        """For the journal's first record."""
        return {"target": self.target, "mode": self.mode, "source": self.source, "override": self.override}


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
    """Fields are read and set under `lock`; the methods take it themselves. `wake` ends the loop's wait.
    `file` is where what was accepted is kept; None for nowhere."""

    lock: threading.Lock
    wake: threading.Event
    file: Path | None = None
    rollback: str = ""  # the line to roll back
    rollback_tx: str = ""  # the name of the transaction that it is to be, also when it was taken
    pushed: Pushed | None = None
    update: Updating | None = None
    busy: str = ""  # the transaction being driven
    progress: Doing = IDLE
    receiving: Doing = IDLE  # a push whose body is on its way; nothing else may be ordered meanwhile
    receiving_line: str = ""
    changes: int = 0  # grows with each change of `busy`, `progress`, `receiving` or what waits
    _kept: str = field(default="", repr=False)  # the transaction of the order in `file`
    _changed: threading.Condition = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._changed = threading.Condition(self.lock)

    # --- for whoever orders

    def order_rollback(self, line: str) -> str:
        """The name of the transaction that it is to be. Raises InputError `busy`, MachineError when it cannot
        be kept."""
        tx = f"tx-{uuid.uuid4().hex[:16]}"
        with self.lock:
            self._refuse_busy(f"roll back the {line}")
            self._keep(tx, {"rollback": {"tx": tx, "line": line}})
            self.rollback, self.rollback_tx = line, tx
            self._tell()
        self.wake.set()
        return tx

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
        another raises InputError `busy`. MachineError when it cannot be kept."""
        with self.lock:
            if self.receiving.tx != pushed.tx:
                self._refuse_busy(f"push a release of the {pushed.line}")
            self._keep(pushed.tx, {"push": pushed._asdict()})
            if self.receiving.tx == pushed.tx:
                self.receiving = IDLE
            self.pushed = pushed
            self._tell()
        self.wake.set()

    def order_update(self, update: Updating) -> None:
        """Raises InputError `busy`, MachineError when it cannot be kept."""
        with self.lock:
            self._refuse_busy("update the system")
            self._keep(update.tx, {"update": update._asdict()})
            self.update = update
            self._tell()
        self.wake.set()

    def doing(self) -> Doing:
        with self.lock:
            return self.progress

    def under_way(self) -> str:
        """The transaction that is driven, or is to be."""
        with self.lock:
            return self._under_way()

    def wait_past(self, changes: int, timeout_s: float) -> int:
        """Wait until `changes` is no longer the number of changes, at most `timeout_s`; what it is now."""
        with self._changed:
            self._changed.wait_for(lambda: self.changes != changes, timeout_s)
            return self.changes

    # --- for the loop

    def recall(self, begun: Collection[str]) -> None:
        """Take up what an updater before this one has accepted, and not begun: its name is not in `begun`.

        What cannot be read is lost, and that is logged: the updater must start.
        """
        if self.file is None:
            return
        try:
            tx, rollback, pushed, update = _read(json.loads(self.file.read_bytes()))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.error("an order is lost: cannot read %s: %r", self.file, error)
            tx, rollback, pushed, update = "", "", None, None
        if not tx or tx in begun:
            with contextlib.suppress(MachineError):
                remove(self.file)
            return
        with self.lock:
            self._kept = tx
            self.rollback, self.rollback_tx, self.pushed = rollback, tx if rollback else "", pushed
            self.update = update
            self._tell()
        self.wake.set()

    def settled(self, tx: str) -> None:
        """The order is in the journal, or was refused; one that came since is kept. Idempotent. Raises
        MachineError."""
        with self.lock:
            if self.file is not None and self._kept == tx:
                remove(self.file)
                self._kept = ""

    def take_rollback(self) -> tuple[str, str]:
        """(line, transaction); ('', '') for none. It counts as under way from now on: `end` must follow."""
        with self.lock:
            line, tx = self.rollback, self.rollback_tx if self.rollback else ""
            self.rollback = ""
            if line:
                self.busy = tx
            return line, tx

    def take_pushed(self) -> Pushed | None:
        """It counts as under way from now on: `end` must follow."""
        with self.lock:
            pushed, self.pushed = self.pushed, None
            if pushed is not None:
                self.busy, self.progress = pushed.tx, Doing(pushed.tx, "stage")
            return pushed

    def take_update(self) -> Updating | None:
        """It counts as under way from now on: `end` must follow."""
        with self.lock:
            update, self.update = self.update, None
            if update is not None:
                self.busy, self.progress = update.tx, Doing(update.tx, "stage")
            return update

    def leave_again(
        self,
        pushed: Pushed | None = None,
        rollback: tuple[str, str] = ("", ""),
        update: Updating | None = None,
    ) -> None:
        """It could not be begun. To be called before `end`, so that no other order can come between."""
        with self.lock:
            self.pushed, (self.rollback, self.rollback_tx), self.update = pushed, rollback, update
            self._tell()

    @contextmanager
    def idle(self) -> Iterator[bool]:
        """Whether nothing is under way; while this lasts, nothing can be ordered either."""
        with self.lock:
            yield not self._under_way()

    def waiting(self) -> bool:
        """Whether an order waits to be taken."""
        with self.lock:
            return bool(self.rollback or self.pushed or self.update)

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

    def _keep(self, tx: str, order: dict[str, Any]) -> None:
        if self.file is not None:
            write_atomic(self.file, json.dumps({"v": 1, **order}).encode(), 0o600)
            self._kept = tx

    def _under_way(self) -> str:
        ordered = self.pushed or self.update
        waits = (ordered.tx if ordered else "") or (self.rollback_tx if self.rollback else "")
        return self.busy or self.receiving.tx or waits

    def _refuse_busy(self, doing: str) -> None:
        if other := self._under_way():
            raise InputError("busy", f"cannot {doing}: transaction {other} is under way")

    def _tell(self) -> None:
        self.changes += 1
        self._changed.notify_all()


def _read(body: Any) -> tuple[str, str, Pushed | None, Updating | None]:
    """(transaction, line of a rollback, push, system update). Raises ValueError, KeyError or TypeError."""
    if "update" in body:
        said = body["update"]
        words = [said[name] for name in ("tx", "version", "digest", "target", "source")]
        if not all(isinstance(word, str) for word in words) or said["mode"] not in MODES:
            raise ValueError(f"expected a system update, got {said!a:.200}")
        return said["tx"], "", None, Updating(**{**said, "override": bool(said["override"])})
    if "push" in body:
        said = body["push"]
        words = [said[name] for name in ("tx", "line", "version", "digest", "target")]
        if not all(isinstance(word, str) for word in words) or said["line"] not in LINES:
            raise ValueError(f"expected a push, got {said!a:.200}")
        pushed = Pushed(**{**said, "generation_floor": int(said["generation_floor"])})
        return said["tx"], "", pushed, None
    said = body["rollback"]
    if not isinstance(said["tx"], str) or not isinstance(said["line"], str) or not said["line"]:
        raise ValueError(f"expected a rollback, got {said!a:.200}")
    return said["tx"], said["line"], None, None
