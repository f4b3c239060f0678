"""What an operator has ordered on the node: a rollback, or a release that was pushed."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace

from instar.core import held
from instar.core.errors import InputError, InstarError, MachineError
from instar.core.journal import Begin
from instar.core.releases import Release
from instar.core.system import LINE as SYSTEM
from instar.engine.target import NotNow
from instar.updater.driving import Driving
from instar.updater.heard import Heard
from instar.updater.orders import Pushed
from instar.updater.targets import Targets

log = logging.getLogger("instar.updater")


class Ordered:
    def __init__(self, driving: Driving, heard: Heard) -> None:
        self.driving, self.heard = driving, heard
        self.orders, self.journals, self.targets = driving.orders, driving.journals, driving.targets

    def obey(self) -> None:
        """Do what waits, if anything. Raises InstarError, NotNow, HandOver."""
        self._rollback()
        self._push()

    def _rollback(self) -> None:
        """Do the rollback that was asked for, if one was."""
        role, tx = self.orders.take_rollback()
        if not role:
            return
        try:
            begin = self._begin_rollback(role, tx)
            self.driving.give_up(role, "an operator went back to the previous release")
            log.info("%s: back to %s, as asked", role, begin.release.name)
            journal = self.journals.begin(begin)
        except InputError:
            self.orders.settled(tx)  # there is nothing to go back to by now
            raise
        except (MachineError, NotNow):
            self.orders.leave_again(rollback=(role, tx))
            raise
        finally:
            self.orders.end()
        self.orders.settled(tx)
        self.driving.drive(journal)

    def _begin_rollback(self, role: str, tx: str) -> Begin:
        # So that the wish that was given up by this does not come back, but a newer one does.
        generation = self.heard.generation(role)
        if role == SYSTEM:
            if SYSTEM in self.driving.put_off:  # two at once would undo each other
                raise InputError("aborted", "cannot roll back the os: its last transaction has no end yet")
            try:
                return self.targets.system().begin_rollback(tx, generation)
            except MachineError as error:  # kept waiting, it would stand before everything else
                raise InputError(error.code, error.text) from None
        release, line = previous_release(self.targets, role), self.targets.of(role).line
        return replace(self.driving.begin(line, role, release, "rollback", tx), generation=generation)

    def _push(self) -> None:
        """Install the release that an operator has pushed, if one has."""
        pushed = self.orders.take_pushed()
        if pushed is None:
            return
        try:
            begin = self._begin_push(pushed)
            self.driving.give_up(pushed.line, "an operator pushed another release")
            log.info("%s: %s, pushed by an operator", pushed.line, begin.release.name)
            journal = self.journals.begin(begin)
        except InputError:
            self.orders.settled(pushed.tx)
            raise
        except (MachineError, NotNow):
            self.orders.leave_again(pushed)
            raise
        finally:
            self.orders.end()
        self.orders.settled(pushed.tx)
        self.driving.apart(pushed.line, lambda: self.driving.drive(journal))

    def _begin_push(self, pushed: Pushed) -> Begin:
        """What the push goes against is asked for, if nothing was heard yet: without a server it holds
        against the first wish that is heard."""
        if not self.heard.anything:
            with contextlib.suppress(InstarError):
                self.heard.ask()
        against = self.heard.generation(pushed.line) if self.heard.anything else held.UNHEARD
        line, release = self.targets.of(pushed.line).line, Release(pushed.version, pushed.digest)
        begin = self.driving.begin(line, pushed.line, release, "push", pushed.tx)
        generation = max(against, pushed.generation_floor or against)
        return replace(begin, target=pushed.target, generation=generation, via="push")


def previous_release(targets: Targets, role: str) -> Release:
    """What a rollback of the line `role` goes to. Raises InputError `nothing-to-roll-back-to`, `unknown-line`."""
    if role == SYSTEM:
        return targets.system().previous()
    target = targets.of(role)
    line = target.line
    name = line.previous()
    if not name or name == line.current() or not line.is_valid(name):
        beside = f"valid previous release beside {line.current()}"
        missing = beside if line.current() else "release of it here"
        text = f"cannot roll back the {target.role}: there is no {missing}"
        raise InputError("nothing-to-roll-back-to", text)
    return target.release_of(name)
