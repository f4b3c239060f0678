"""A jobs folder with runners, a shelf and a service that a test plays, and what was sent of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from instar.agent.jobs import Jobs
from instar.agent.runners import Runners
from instar.agent.store import DiskStore
from instar.host.clock import Clock
from instar.wire.messages import Job, Message, Result
from tests.agent import shelving
from tests.agent.spawning import COMMAND, children, descriptors

Kind = TypeVar("Kind", bound=Message)
NOTE = """
import time
def note(word):
    with open(request["args"]["log"], "a") as log: log.write(word + " ")
def held():
    while not os.path.exists(request["args"]["log"] + ".go"): time.sleep(0.01)
note(request["args"]["name"])
time.sleep(request["args"].get("sleep", 0))
if request["args"]["hold"]: held()
"""


class FakeClock(Clock):
    """Wall and boot time that a test moves on; the loop's own time goes as it goes."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def wall(self) -> float:
        return super().wall() + self.ahead

    def boottime(self) -> float:
        return super().boottime() + self.ahead


class Services:
    """A service module `asked` that a test plays."""

    def __init__(self) -> None:
        self.questions: list[tuple[str, dict[str, Any], float]] = []
        self.answer: dict[str, Any] | Exception | None = {"n": 1}
        self.cancelled = 0

    def states(self) -> dict[str, str]:
        return {"asked": "ok"}

    async def request(
        self, name: str, args: dict[str, Any], deadline_s: float, heed: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        self.questions.append((name, args, deadline_s))
        heed({"id": "1", "log": "asked"})
        if isinstance(self.answer, Exception):
            raise self.answer
        try:
            if self.answer is None:
                await asyncio.sleep(600)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.answer or {}


class World:
    """A jobs folder, a shelf, a log that the jobs write to, and what was sent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.scratch = folder / "jobs", folder / "log", folder / "scratch"
        self.log.touch()
        self.sent: list[Message] = []
        self.came = asyncio.Event()
        self.shelves, self.services, self.clock = shelving.World(folder), Services(), FakeClock()
        self.runners: list[Runners] = []
        self.tasks: list[asyncio.Task[None]] = []

    def jobs(self) -> Jobs:
        """Of an agent that has just started, and has not begun to work."""
        self.runners.append(Runners(COMMAND, grouped=False))
        disk = DiskStore(self.folder, self.clock.wall, boot_id="boot", apart=at_once)
        return Jobs(
            disk, self.runners[-1], self.shelves.shelf, lambda: self.services, self.send, self.scratch, self.clock,
            lambda: 0.0,
        )  # fmt: skip

    def work(self, jobs: Jobs) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(jobs.run()))
        return self.tasks[-1]

    def send(self, message: Message) -> bool:
        self.sent.append(message)
        self.came.set()
        return True

    def job(
        self,
        name: str,
        purpose: str = "job",
        sleep: float = 0.0,
        code: str = "",
        hold: bool = False,
        **more: Any,
    ) -> Job:
        """It notes its name, and then goes on after `sleep` seconds; with `hold`, not before `go`."""
        args = {"log": str(self.log), "name": name, "sleep": sleep, "hold": hold, "code": NOTE + code}
        return Job(name, more.pop("module", "count"), purpose, args, **more)

    def go(self) -> None:
        """Let those go on that hold."""
        self.log.with_name(f"{self.log.name}.go").touch()

    async def next(self, kind: type[Kind], within_s: float = 60.0) -> Kind:
        """The next message of `kind`; others are kept."""
        async with asyncio.timeout(within_s):
            while True:
                for message in self.sent:
                    if isinstance(message, kind):
                        self.sent.remove(message)
                        return message
                self.came.clear()
                await self.came.wait()

    async def result(self) -> Result:
        return await self.next(Result)

    async def until_noted(self, *names: str) -> None:
        async with asyncio.timeout(60):
            while not set(names) <= set(self.log.read_text().split()):
                await asyncio.sleep(0.01)

    def files(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.folder / folder).iterdir())


def at_once(work: Callable[[], None]) -> None:
    work()


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    before = descriptors()
    made = World(tmp_path)
    yield made
    for task in made.tasks:
        task.cancel()
    if made.tasks:
        await asyncio.wait(made.tasks)
    for runners in made.runners:
        await runners.close()
    assert descriptors() == before
    assert children() == []
    assert not made.scratch.exists() or list(made.scratch.iterdir()) == []
