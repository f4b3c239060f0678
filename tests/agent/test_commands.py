"""Commands: kept, done in order, ended by the next agent when this one was killed, and never done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.agent.command_store import KEPT, CommandStore
from instar.agent.commands import MOST_WAITING, Commands
from instar.core.commands import MOST_TRIES
from instar.core.errors import InputError, MachineError
from instar.host import points
from instar.host.clock import Clock
from instar.wire.messages import Command, CommandStatus, Message, Taken


class FakeClock(Clock):
    def __init__(self) -> None:
        self.now, self.boot = 1000.0, "boot-1"

    def boottime(self) -> float:
        return self.now

    def boot_id(self) -> str:
        return self.boot


class FakeModules:
    """The Supervisor's part of it, and a record of what was asked."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.asked = clock, list[tuple[Any, ...]]()
        self.found: dict[str, str] = {"a": "running"}
        self.takes_s = 0.0
        self.hold = asyncio.Event()
        self.hold.set()

    async def restart(self, names: list[str], within_s: float, who: str) -> dict[str, str]:
        self.asked.append(("restart", tuple(names), who))
        if "moon" in names:
            raise InputError("unknown-module", "cannot restart: moon")
        await self.hold.wait()
        self.clock.now += self.takes_s
        return dict(self.found)

    async def stop_all(self, within_s: float, who: str) -> dict[str, str]:
        self.asked.append(("stop_all", round(within_s, 1), who))
        await self.hold.wait()
        return {"a": "stopped", "b": "killed"}

    async def all_running(self, within_s: float) -> dict[str, str]:
        self.asked.append(("all_running", round(within_s, 1)))
        self.clock.now += self.takes_s
        return dict(self.found)


class World:
    """A folder, and the agents that one after the other work on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder / "commands", FakeClock()
        self.modules = FakeModules(self.clock)
        self.sent: list[Message] = []
        self.connected, self.left = True, False
        self.jobs_finished: list[float] = []
        self.cycled: list[str] = []
        self.cycle_says = ""
        self.commands = self.agent()

    def agent(self) -> Commands:
        """The next one."""
        self.commands = Commands(CommandStore(self.folder), self.modules, self, self.clock)
        return self.commands

    async def finish(self, within_s: float) -> None:
        self.jobs_finished.append(within_s)

    async def cycle(self, command_id: str) -> str:
        self.cycled.append(command_id)
        if not self.cycle_says:
            await asyncio.Event().wait()
        return self.cycle_says

    def leave(self) -> None:
        self.left = True

    def send(self, message: Message) -> bool:
        if self.connected:
            self.sent.append(message)
        return self.connected

    # --- what tests look at

    def statuses(self, command_id: str) -> list[str]:
        return [m.status for m in self.sent if isinstance(m, CommandStatus) and m.id == command_id]

    def last(self, command_id: str) -> CommandStatus:
        found = [m for m in self.sent if isinstance(m, CommandStatus) and m.id == command_id]
        return found[-1]

    async def work(self, until: Any = None) -> None:
        """Let the agent work until nothing is left to do, or `until` is true; then it is gone."""
        task = asyncio.create_task(self.commands.run())
        try:
            async with asyncio.timeout(10):
                while not (until() if until else self.idle()):
                    if task.done():
                        task.result()
                    await asyncio.sleep(0.001)
        finally:
            task.cancel()
            await asyncio.wait([task])

    def idle(self) -> bool:
        return all(e.status.status in ("success", "failure", "timeout") for e in self.commands._open)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield World(tmp_path)
    points.listener = None


def restart(command_id: str = "c-1", kind: str = "restart-module", *modules: str, **more: Any) -> Command:
    return Command(command_id, kind, list(modules), "server:t-1", **more)


async def test_a_restart_of_modules_from_the_server(world: World) -> None:
    world.commands.take(restart("c-1", "restart-module", "a"))
    assert world.sent[0] == Taken("c-1")
    await world.work()
    assert world.statuses("c-1") == ["pending", "in-progress", "success"]
    end = world.last("c-1")
    assert (end.code, end.modules, end.origin) == ("", {"a": "running"}, "server:t-1")
    assert end.ended >= end.asked > 0
    assert world.modules.asked == [("restart", ("a",), "server:t-1")]


async def test_in_the_order_of_arrival_whoever_asked(world: World) -> None:
    world.modules.hold.clear()
    world.commands.take(restart("z"))
    local = world.commands.order(["b"], agent=False, within_s=30.0, origin="local:0")
    world.commands.take(restart("a", "restart-module", "c"))
    assert world.commands.status(local)["status"] == "pending"
    world.modules.hold.set()
    await world.work()
    assert [asked[1:] for asked in world.modules.asked] == [
        ((), "server:t-1"), (("b",), "local:0"), (("c",), "server:t-1"),
    ]  # fmt: skip
    assert world.commands.status(local)["status"] == "success"


@pytest.mark.parametrize(
    ("found", "takes_s", "status", "code"),
    [
        ({"a": "running"}, 1.0, "success", ""),
        ({}, 1.0, "success", ""),
        ({"a": "failed: no disk"}, 1.0, "failure", "module-failed"),
        ({"a": "running"}, 40.0, "timeout", "timeout"),
    ],
)
@pytest.mark.parametrize("kind", ["restart-module", "restart-agent"])
async def test_how_it_ends(
    world: World, kind: str, found: dict[str, str], takes_s: float, status: str, code: str
) -> None:
    world.modules.found, world.modules.takes_s = found, takes_s
    world.commands.take(restart("c-1", kind))
    if kind == "restart-agent":
        await world.work(lambda: world.cycled)
        world.agent()
    await world.work()
    end = world.last("c-1")
    assert (end.status, end.code, end.modules) == (status, code, found)


# --- the agent itself


async def test_a_restart_of_the_agent_is_ended_by_the_next_one(world: World) -> None:
    world.commands.take(restart("c-1", "restart-agent", within_s=30.0))
    await world.work(lambda: world.cycled)
    assert world.modules.asked == [("stop_all", 20.0, "server:t-1")]
    assert world.jobs_finished == [20.0]
    assert world.statuses("c-1") == ["pending", "in-progress"]
    assert not world.left
    world.clock.now += 3.0
    world.agent()
    await world.work()
    assert world.modules.asked[1:] == [("all_running", 27.0)]
    end = world.last("c-1")
    assert (end.status, end.text, end.modules) == ("success", "killed: b", {"a": "running"})
    assert world.cycled == ["c-1"]  # once


async def test_an_agent_that_nobody_restarts_leaves_by_itself(world: World) -> None:
    world.cycle_says = "its child ended with status 4"
    world.commands.take(restart("c-1", "restart-agent"))
    await world.work(lambda: world.left)
    assert world.last("c-1").status == "in-progress"
    world.agent()
    await world.work()
    assert world.last("c-1").status == "success"


async def test_a_reboot_in_between_counts_anew(world: World) -> None:
    world.commands.take(restart("c-1", "restart-agent"))
    await world.work(lambda: world.cycled)
    world.clock.now, world.clock.boot = 12.0, "boot-2"
    world.agent()
    await world.work()
    assert world.modules.asked[-1] == ("all_running", 30.0)
    assert world.last("c-1").status == "success"


async def test_an_agent_that_was_away_for_long_says_so(world: World) -> None:
    world.commands.take(restart("c-1", "restart-agent"))
    await world.work(lambda: world.cycled)
    world.clock.now += 3600.0
    world.agent()
    await world.work()
    assert world.modules.asked[-1] == ("all_running", 2.0)
    end = world.last("c-1")
    assert (end.status, end.modules) == ("timeout", {"a": "running"})
    assert end.text.startswith("cannot restart within 30 s: it took 3600.0 s; everything runs again")


# --- kills


class Kill(BaseException):
    pass


def kill_at(point: str) -> None:
    def listen(reached: str) -> None:
        if reached == point:
            points.listener = None
            raise Kill

    points.listener = listen


POINTS = ["command:received", "command:in-progress", "command:stopped", "command:ended"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", ["restart-module", "restart-agent"])
async def test_a_kill_anywhere_leads_to_one_end(world: World, kind: str, point: str) -> None:
    """`restart` does not reach `command:stopped` here: that is the Supervisor's."""
    kill_at(point)
    try:
        world.commands.take(restart("c-1", kind))
        await world.work(lambda: world.idle() or world.cycled)
        if kind == "restart-agent":
            world.agent()  # the one that was asked for
        await world.work()
    except Kill:
        pass
    points.listener = None
    world.sent.clear()
    world.agent()
    world.commands.take(restart("c-1", kind))  # the server sends it again
    await world.work(lambda: world.idle() or world.cycled)
    if kind == "restart-agent" and not world.idle():
        world.agent()
        await world.work()
    assert world.last("c-1").status == "success"
    times = len(world.modules.asked)
    world.agent()
    world.commands.take(restart("c-1", kind))
    await world.work()
    assert len(world.modules.asked) == times  # it is known: not once more
    assert world.last("c-1").status == "success"


async def test_a_restart_of_modules_that_was_cut_off_is_done_again_but_not_for_ever(world: World) -> None:
    world.modules.hold.clear()
    world.commands.take(restart("c-1"))
    for number in range(MOST_TRIES):
        await world.work(lambda count=number + 1: len(world.modules.asked) == count)
        world.agent()
    await world.work()
    assert len(world.modules.asked) == MOST_TRIES
    end = world.last("c-1")
    assert (end.status, end.code) == ("failure", "interrupted")


# --- what is kept


async def test_the_end_is_told_until_it_is_acknowledged(world: World) -> None:
    world.connected = False
    world.commands.take(restart("c-1"))
    await world.work()
    assert world.sent == []
    world.connected = True
    for _ in range(2):
        world.agent()
        world.commands.resend()
    assert world.statuses("c-1") == ["success", "success"]
    world.commands.acknowledged("c-1")
    world.commands.acknowledged("c-1")
    world.commands.acknowledged("unheard-of")
    world.agent().resend()
    assert len(world.sent) == 2
    world.commands.take(restart("c-1"))  # a late repeat
    assert world.last("c-1").status == "success"
    assert world.commands.status("c-1")["status"] == "success"
    assert len(world.modules.asked) == 1


async def test_an_acknowledgement_before_the_end_is_none(world: World) -> None:
    world.commands.take(restart("c-1"))
    world.commands.acknowledged("c-1")
    await world.work()
    world.sent.clear()
    world.agent().resend()
    assert world.statuses("c-1") == ["success"]


async def test_the_newest_that_ended_are_remembered_and_no_more(world: World) -> None:
    for number in range(KEPT + 10):
        world.commands.take(restart(f"c-{number}"))
        await world.work()
        world.commands.acknowledged(f"c-{number}")
    assert len(list(world.folder.glob("done/*.json"))) == KEPT
    asked = len(world.modules.asked)
    world.agent().take(restart("c-10"))
    await world.work()
    assert len(world.modules.asked) == asked


async def test_what_the_server_never_acknowledges_is_bounded_too(world: World) -> None:
    for number in range(KEPT + 10):
        world.commands.take(restart(f"c-{number}"))
        await world.work()
    assert len(list(world.folder.glob("*.json"))) == KEPT


# --- bad input


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (restart("c-1", "reboot"), "bad-command"),
        (restart("c-1", "restart-module", "../x"), "bad-module-name"),
        (restart("c-1", "restart-agent", within_s=0.0), "bad-command"),
    ],
)
async def test_what_cannot_be_obeyed_ends_at_once(world: World, command: Command, code: str) -> None:
    world.commands.take(command)
    assert (world.last("c-1").status, world.last("c-1").code) == ("failure", code)
    assert not list(world.folder.glob("*.json"))


async def test_an_id_that_is_no_file_name_is_refused(world: World) -> None:
    with pytest.raises(InputError):
        world.commands.take(restart("../c"))
    with pytest.raises(InputError) as caught:
        world.commands.status("nobody")
    assert caught.value.code == "unknown-command-id"


async def test_an_unknown_module_fails_with_its_code(world: World) -> None:
    world.commands.take(restart("c-1", "restart-module", "moon"))
    await world.work()
    assert world.statuses("c-1") == ["pending", "in-progress", "failure"]
    assert world.last("c-1").code == "unknown-module"


async def test_how_many_wait_is_bounded(world: World) -> None:
    for number in range(MOST_WAITING):
        world.commands.take(restart(f"c-{number}"))
    world.commands.take(restart("one-more"))
    assert world.last("one-more").code == "too-many-commands"
    with pytest.raises(MachineError):
        world.commands.order([], agent=True, within_s=30.0, origin="local:0")


async def test_the_origin_is_shown_in_ascii_and_short(world: World) -> None:
    world.commands.take(Command("c-1", "restart-module", [], "\x1b[31mserver\n" + "x" * 500))
    origin = world.last("c-1").origin
    assert origin.isprintable()
    assert len(origin) == 100


async def test_a_file_that_cannot_be_read_is_set_aside(world: World) -> None:
    world.commands.take(restart("c-1"))
    world.commands.take(restart("c-2"))
    paths = sorted(world.folder.glob("*.json"))
    paths[0].write_bytes(paths[0].read_bytes()[:40])
    (world.folder / "x.json").write_text("{}")
    world.agent()
    await world.work()
    assert world.statuses("c-1")[-1] == "pending"
    assert world.last("c-2").status == "success"
    assert len(list(world.folder.glob("*.unreadable"))) == 2


async def test_a_full_disk_stops_nothing_before_it_is_on_the_disk(world: World) -> None:
    world.commands.take(restart("c-1", "restart-agent"))
    (entry,) = world.folder.glob("*.json")
    blocker = world.folder / f".{entry.name}.new"
    blocker.mkdir()  # the temporary file cannot be made
    await world.work()
    assert world.modules.asked == []
    assert (world.last("c-1").status, world.last("c-1").code) == ("failure", "disk-failed")
