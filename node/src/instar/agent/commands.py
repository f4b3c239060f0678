"""What the core itself was told to do: kept on the disk, done one after the other in the order of arrival.

'In progress' is on the disk before anything is stopped. A restart of the agent ends in another process: the
next agent finds the command in progress, waits for the modules, and says how it went, also when this one was
killed on the way. The final status is sent until the server has acknowledged it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any, NoReturn, Protocol

from instar.agent.command_store import KEPT, CommandStore, Entry
from instar.agent.store import check_job_id
from instar.core.commands import (
    FINAL,
    MOST_TRIES,
    RESTART_AGENT,
    RESTART_MODULE,
    STOP_SHARE,
    Event,
    Status,
    Verdict,
    after,
    check,
    verdict,
)
from instar.core.errors import InputError, InstarError, MachineError
from instar.core.light import asdict, replace
from instar.core.modules import check_name
from instar.host.clock import Clock
from instar.host.points import reach
from instar.wire.messages import Command, CommandStatus, Message, Taken

MOST_WAITING = 64  # commands that have not ended
CONFIRM_LEAST_S = 2.0  # for the modules to come up after the agent did, however late that was
SLACK_S = 10.0  # past its bound nothing of a command is waited for any longer

log = logging.getLogger("instar.agent")


class Modules(Protocol):
    """What of the Supervisor commands need."""

    async def restart(self, names: list[str], within_s: float, who: str) -> dict[str, str]: ...
    async def stop_all(self, within_s: float, who: str) -> dict[str, str]: ...
    async def all_running(self, within_s: float) -> dict[str, str]: ...


class Around(Protocol):
    """What of the agent commands need."""

    async def finish(self, within_s: float) -> None:
        """Let the jobs that run end, and begin no other."""

    async def cycle(self, command_id: str) -> str:
        """Have a child restart this process. Returns only when that does not happen: why not."""

    def leave(self) -> None:
        """Leave, and be started again, without anybody's help."""

    def send(self, message: Message) -> bool:
        """Whether there was a connection."""


class Commands:
    """Takes what is in `store` up again. Raises MachineError when the disk fails."""

    def __init__(self, store: CommandStore, modules: Modules, around: Around, clock: Clock) -> None:
        self._store, self._modules, self._around, self._clock = store, modules, around, clock
        self._open, self._done = store.load()
        self._next = max((entry.number for entry in (*self._open, *self._done)), default=0) + 1
        self._arrived = asyncio.Event()

    @property
    def held(self) -> int:
        return len(self._open)

    def take(self, command: Command) -> None:
        """Accept the server's command once; a repeat is told how it stands. One that cannot be obeyed gets a
        final status. Raises InputError for an id that nobody could use.
        """
        check_job_id(command.id)
        known = self._find(command.id)
        if known is not None:
            self._tell(known)
            return
        try:
            self._receive(command)
        except InstarError as error:
            log.error("command %s is not taken: %s", command.id, error)
            status = self._status(command, Status.FAILURE, error.code, error.text)
            self._around.send(replace(status, ended=status.asked))

    def order(self, modules: list[str], agent: bool, within_s: float, origin: str) -> str:
        """Accept a local command; its id. Raises InputError `bad-command`, `bad-module-name`, MachineError."""
        kind = RESTART_AGENT if agent else RESTART_MODULE
        command_id = f"c-{os.urandom(8).hex()}"
        self._receive(Command(command_id, kind, modules, origin, within_s=within_s))
        return command_id

    def status(self, command_id: str) -> dict[str, Any]:
        """How a command stands. Raises InputError `unknown-command-id`."""
        entry = self._find(command_id)
        if entry is None:
            text = f"cannot tell: expected the id of a command of this node, got {command_id!a:.80}"
            raise InputError("unknown-command-id", text)
        return asdict(entry.status)

    def acknowledged(self, command_id: str) -> None:
        entry = next((e for e in self._open if e.command.id == command_id), None)
        if entry is not None and _ended(entry):
            self._store.set_done(entry)
            reach("command:acked")
            self._open.remove(entry)
            self._done.append(entry)
            self._trim(self._done, self._done)

    def resend(self) -> None:
        """Say how everything stands that the server has not acknowledged: after each welcome."""
        for entry in self._open:
            self._around.send(entry.status)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            entry = next((e for e in self._open if not _ended(e)), None)
            if entry is None:
                self._arrived.clear()
                await self._arrived.wait()
            else:
                await self._do(entry)

    # --- one command

    async def _do(self, entry: Entry) -> None:
        """Do it, or go on with it, to its end."""
        command, found = entry.command, dict(entry.status.modules)
        try:
            async with asyncio.timeout(command.within_s + SLACK_S):
                if command.type == RESTART_AGENT and entry.status.status == Status.PENDING.value:
                    await self._leave_for(entry)
                elif command.type == RESTART_AGENT:
                    found, end = await self._confirm(entry)
                else:
                    found, end = await self._restart(entry)
        except InstarError as error:
            end = Verdict(Event.FAILED, error.code, error.text)
        except TimeoutError:
            text = f"cannot {command.type} within {command.within_s:g} s: it did not end"
            end = Verdict(Event.LATE, "timeout", text)
        self._end(entry, end, found)

    async def _restart(self, entry: Entry) -> tuple[dict[str, str], Verdict]:
        if entry.tries >= MOST_TRIES:
            text = f"cannot restart: it was begun {entry.tries} times and never ended"
            raise MachineError("interrupted", text)
        command = entry.command
        self._begin(entry)
        found = await self._modules.restart(command.modules, command.within_s, command.origin)
        return found, verdict(found, self._spent_s(entry), command.within_s)

    async def _leave_for(self, entry: Entry) -> NoReturn:
        """Stop all that we look after, and have this process replaced. Only being cancelled ends this well."""
        command = entry.command
        log.info("restart of the agent begins, asked by %s", command.origin)
        self._begin(entry)
        share_s = command.within_s * STOP_SHARE
        # No job begins any more; those that ask a module are answered before that module is stopped.
        _, how = await asyncio.gather(
            self._around.finish(share_s), self._modules.stop_all(share_s, command.origin)
        )
        entry.status = replace(entry.status, modules=how)
        try:
            self._store.write(entry)
        except InstarError as error:  # all is stopped: there is no way back now
            log.error("command %s: %s", command.id, error)
        reach("command:stopped")
        why = await self._around.cycle(command.id)
        log.error("nobody restarts the agent: %s; it leaves by itself", why)
        self._around.leave()
        await asyncio.Event().wait()
        raise AssertionError("an event that nobody sets was set")

    async def _confirm(self, entry: Entry) -> tuple[dict[str, str], Verdict]:
        """The agent is back: are its modules?"""
        within_s, how = entry.command.within_s, entry.status.modules
        left_s = within_s - self._spent_s(entry)
        found = await self._modules.all_running(max(left_s, CONFIRM_LEAST_S))
        end = verdict(found, self._spent_s(entry), within_s)
        killed = sorted(name for name, words in how.items() if words == "killed")
        if killed:
            end = end._replace(text=f"{end.text}; killed: {', '.join(killed)}".removeprefix("; "))
        return found, end

    def _begin(self, entry: Entry) -> None:
        entry.boot_id, entry.begun = self._clock.boot_id(), self._clock.boottime()
        entry.tries += 1
        self._set(entry, Event.BEGUN)
        self._store.write(entry)
        reach("command:in-progress")
        self._around.send(entry.status)

    def _end(self, entry: Entry, end: Verdict, found: dict[str, str]) -> None:
        modules = {name: words[:300] for name, words in found.items()}
        ended = round(self._clock.wall(), 3)
        self._set(entry, end.event)
        entry.status = replace(
            entry.status, code=end.code, text=end.text[:1000], modules=modules, ended=ended
        )
        try:
            self._store.write(entry)
        except InstarError as error:  # the next agent ends it again
            log.error("command %s: %s", entry.command.id, error)
        reach("command:ended")
        what = (
            "the agent" if entry.command.type == RESTART_AGENT else ", ".join(entry.command.modules) or "all"
        )
        status, who = entry.status, entry.command.origin
        level = logging.INFO if end.event is Event.DONE else logging.ERROR
        words = f"{status.status} {status.text}".strip()
        log.log(level, "restart of %s, asked by %s (%s): %s", what, who, entry.command.id, words)
        self._around.send(status)
        reach("command:sent")
        self._trim(self._open, [e for e in self._open if _ended(e)])

    # --- what is known

    def _receive(self, command: Command) -> None:
        check(command.type, command.modules, command.within_s)
        for name in command.modules:
            check_name(name)
        if sum(not _ended(entry) for entry in self._open) >= MOST_WAITING:
            raise MachineError("too-many-commands", f"cannot take command: {MOST_WAITING} wait already")
        command = replace(command, origin=ascii(command.origin)[1:-1][:100] or "unknown")
        entry = Entry(self._next, command, self._status(command, Status.PENDING))
        self._store.write(entry)
        self._next += 1
        self._open.append(entry)
        reach("command:received")
        self._tell(entry)
        self._arrived.set()

    def _tell(self, entry: Entry) -> None:
        self._around.send(Taken(entry.command.id))
        self._around.send(entry.status)

    def _status(self, command: Command, status: Status, code: str = "", text: str = "") -> CommandStatus:
        asked = round(self._clock.wall(), 3)
        return CommandStatus(
            command.id, command.type[:40], status.value, code, text, command.origin[:100], {}, asked
        )

    def _set(self, entry: Entry, event: Event) -> None:
        entry.status = replace(entry.status, status=after(Status(entry.status.status), event).value)

    def _spent_s(self, entry: Entry) -> float:
        """Seconds since it began; a boot in between starts the count anew."""
        now, boot_id = self._clock.boottime(), self._clock.boot_id()
        if entry.boot_id != boot_id:
            entry.boot_id, entry.begun = boot_id, now
        return now - entry.begun

    def _find(self, command_id: str) -> Entry | None:
        return next((e for e in (*self._open, *self._done) if e.command.id == command_id), None)

    def _trim(self, entries: list[Entry], ended: list[Entry]) -> None:
        """Forget the oldest of `ended` beyond KEPT."""
        for entry in ended[: max(0, len(ended) - KEPT)]:
            self._store.forget(entry)
            entries.remove(entry)


def _ended(entry: Entry) -> bool:
    return Status(entry.status.status) in FINAL
