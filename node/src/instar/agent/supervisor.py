"""The service modules of this node: started in the order of what depends on what, kept running, restarted.

The disk says which there are (`Shelf.services`); it is asked at the start and when the updater says that a
module's `current` has moved. One restart, or reload, happens at a time. A module that depends on one that is
restarted is restarted with it: it stops before, and starts after it. One that falls by itself takes nobody
along.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from instar.agent.asking import Heed
from instar.agent.service import Service, Starter
from instar.agent.strays import end_stray
from instar.core.commands import STOP_SHARE
from instar.core.depends import dependents, depths, faults
from instar.core.errors import InputError, InstarError, ReleaseError
from instar.core.lifecycle import COMING, SERVES, SHOWN, UP
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.points import reach

if TYPE_CHECKING:
    from instar.agent.shelf import Module, Shelf

RESTART_FALLS, QUESTION_FALLS = 2, 4  # in a row, after which a restart, or a question, gives it up
RELOAD_S = 30.0  # for the old one, and those that depend on it, to stop
STRAY_S = 5.0  # for a process of a module that is not there any more
RUNNING = "running"

log = logging.getLogger("instar.agent")


class Supervisor:
    """`changed` is called after each change of a module's state; `random01` draws from [0, 1]."""

    def __init__(
        self,
        layout: Layout,
        shelf: Shelf,
        runners: Starter,
        clock: Clock,
        random01: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self._layout, self._shelf, self._runners, self._clock = layout, shelf, runners, clock
        self._random01, self._tell = random01, changed
        self._services: dict[str, Service] = {}
        self._loaded = asyncio.Event()
        self._pulse = asyncio.Event()  # set, and replaced, at each change
        self._changing = asyncio.Lock()
        self._halted = False  # nothing is started any more
        self._asking = 0  # questions that are open

    async def run(self) -> None:
        """Until cancelled; then what still runs is killed. Raises what went wrong in our own code, if anything."""
        try:
            for module in self._shelf.services().values():
                self._add(module)
            self._loaded.set()
            self._change()
            for name in list(self._services):
                self._start(name)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._end_forgotten())
                while True:
                    self._raise_fault()
                    await self._pulse.wait()
        finally:
            for service in self._services.values():
                service.end_now()

    # --- what others want to know

    def states(self) -> dict[str, str]:
        """Name -> ok | starting | failed."""
        return {name: SHOWN[service.state] for name, service in self._services.items()}

    def digests(self) -> dict[str, str]:
        """Name -> the digest of the module that runs, or is to."""
        return {name: service.module.digest for name, service in self._services.items()}

    def pids(self) -> dict[str, int]:
        """Name -> its process; 0 when there is none."""
        return {name: service.pid for name, service in self._services.items()}

    def describe(self) -> list[dict[str, Any]]:
        return [service.describe() for _, service in sorted(self._services.items())]

    async def request(self, name: str, args: dict[str, Any], deadline_s: float, heed: Heed) -> dict[str, Any]:
        """Ask a module; one that is being started, or has just failed, is waited for. A question is put once.

        Raises InputError `no-module`, `bad-job`; ReleaseError `module-failed`, `deadline`, `interrupted`
        (it ended, or the agent ends), or with the module's own code.
        """
        self._asking += 1
        try:
            return await self._request(name, args, self._clock.monotonic() + deadline_s, heed)
        finally:
            self._asking -= 1
            self._beat()

    async def _request(self, name: str, args: dict[str, Any], end: float, heed: Heed) -> dict[str, Any]:
        await self._until(self._loaded.is_set, end)
        while True:
            await self._until(lambda: self._serves(name) or not self._is_coming(name, QUESTION_FALLS), end)
            service = self._services.get(name)
            if service is None:
                raise InputError("no-module", f"cannot ask {name}: expected a service module of this node")
            if service.state not in SERVES:
                why = service.error or f"it is {service.state.value}"
                code = "interrupted" if self._halted else "module-failed"
                raise ReleaseError(code, f"cannot ask {name}: it does not run: {why}")
            try:
                return await service.ask(args, max(end - self._clock.monotonic(), 0.001), heed)
            except InstarError as error:
                if error.code != "stopping" or service.state in SERVES:
                    raise  # else it was told to stop before it had begun with this

    # --- what commands and the updater want done

    async def restart(self, names: list[str], within_s: float, who: str) -> dict[str, str]:
        """Stop and start `names` ([]: all) and what depends on them. Name -> 'running' or 'failed: …'.

        Bounded by `within_s`: what does not stop in its share of that is killed, and started again.
        Raises InputError `unknown-module`; then nothing was stopped.
        """
        began = self._clock.monotonic()
        await self._until(self._loaded.is_set, began + within_s)
        async with self._changing:
            chosen = self._chosen(names)
            log.info("restart of %s begins, asked by %s", _list(chosen), who)
            how = await self._stop(chosen, began + within_s * STOP_SHARE)
            reach("command:stopped")
            for name in chosen:
                self._start(name)
            found = await self.running(chosen, began + within_s - self._clock.monotonic())
        killed = sorted(name for name, words in how.items() if words == "killed")
        words = f"; killed: {', '.join(killed)}" if killed else ""
        spent_s = self._clock.monotonic() - began
        log.info(
            "restart of %s, asked by %s, ended after %.2f s: %s%s", _list(chosen), who, spent_s, found, words
        )
        return found

    async def running(self, names: Iterable[str], within_s: float) -> dict[str, str]:
        """Wait until each of `names` runs, or has failed a few times; name -> 'running' or 'failed: …'."""
        end = self._clock.monotonic() + within_s
        await self._until(self._loaded.is_set, end)
        wanted = list(names)
        await self._until(lambda: not any(self._is_coming(name, RESTART_FALLS) for name in wanted), end)
        return {name: self._how(name) for name in wanted}

    async def all_running(self, within_s: float) -> dict[str, str]:
        end = self._clock.monotonic() + within_s
        await self._until(self._loaded.is_set, end)
        return await self.running(list(self._services), end - self._clock.monotonic())

    async def stop_all(self, within_s: float, who: str) -> dict[str, str]:
        """Stop all, for good: nothing is started any more. Name -> 'stopped' or 'killed'.

        Questions that are open have half of `within_s` to be answered first; see that no new ones come.
        """
        end = self._clock.monotonic() + within_s
        if not self._halted:
            await self._until(lambda: not self._asking, end - within_s / 2)
        self._halted = True
        if not self._services:
            return {}
        log.info("all modules are stopped, asked by %s", who)
        how = await self._stop(list(self._services), end)
        log.info("all modules have stopped, asked by %s: %s", who, how)
        return how

    async def reload(self, name: str) -> None:
        """`current` of a module has moved, or vanished: stop the old one, start the new. Idempotent.

        What depends on it is stopped before and started after it. Returns when the new one is being started.
        """
        end = self._clock.monotonic() + RELOAD_S
        await self._until(self._loaded.is_set, end)
        async with self._changing:
            module, old = self._shelf.services().get(name), self._services.get(name)
            if (module.digest if module else "") == (old.module.digest if old else ""):
                return
            log.info("module %s: %s -> %s", name, _version(old.module if old else None), _version(module))
            chosen = self._with_dependents([name] if old else [])
            await self._stop(chosen, end)
            reach("reload:stopped")
            if old is not None:
                old.retire()
                del self._services[name]
            if module is not None:
                self._add(module)
            self._change()
            for each in {*chosen, name} & set(self._services):
                self._start(each)

    # --- order

    def _graph(self) -> dict[str, tuple[str, ...]]:
        return {name: service.depends for name, service in self._services.items()}

    def _with_dependents(self, names: Iterable[str]) -> list[str]:
        return sorted(dependents(self._graph(), names))

    def _chosen(self, names: list[str]) -> list[str]:
        unknown = sorted(set(names) - set(self._services))
        if unknown:
            known = ", ".join(sorted(self._services)) or "none"
            text = f"cannot restart: expected modules of this node ({known}), got {', '.join(unknown)}"
            raise InputError("unknown-module", text)
        return self._with_dependents(names or self._services)

    async def _gate(self, service: Service) -> None:
        """Wait until `service` may start. What can never be, or not now, is its failed state, with the reason."""
        while True:
            why = faults(self._graph()).get(service.name, "")
            needs = [self._services[need] for need in service.depends if need in self._services]
            down = [need.name for need in needs if need.state not in UP]
            if not why and not down:
                return
            broken = [need.name for need in needs if SHOWN[need.state] == "failed" and need.state not in UP]
            if why or broken:
                service.block(why or f"it waits for {', '.join(broken)}, which failed")
            await self._pulse.wait()

    async def _stop(self, names: Iterable[str], end: float) -> dict[str, str]:
        """Stop `names`, each after those of them that depend on it."""
        level, out_of_order = depths(self._graph()), faults(self._graph())
        tasks: dict[str, asyncio.Task[str]] = {}

        async def stop_one(name: str) -> str:
            above = [
                tasks[n] for n in tasks if name in self._services[n].depends and name not in out_of_order
            ]
            if above:
                await asyncio.wait(above)
            # What lies below must have time of its own to save its state.
            share_s = (end - self._clock.monotonic()) / (1 + level[name])
            return await self._services[name].stop(share_s)

        for name in names:
            tasks[name] = asyncio.create_task(stop_one(name))
        await asyncio.gather(*tasks.values())
        return {name: task.result() for name, task in tasks.items()}

    # --- the rest

    def _add(self, module: Module) -> None:
        name = module.manifest.name
        place = self._layout.module(name)
        used, clock, chance = self._shelf.mark_used, self._clock, self._random01
        self._services[name] = Service(module, place, self._runners, clock, chance, used, self._change)

    def _start(self, name: str) -> None:
        if not self._halted:
            self._services[name].start(self._gate)

    def _change(self) -> None:
        self._beat()
        self._tell()

    def _beat(self) -> None:
        pulse, self._pulse = self._pulse, asyncio.Event()
        pulse.set()

    def _is_coming(self, name: str, falls: int) -> bool:
        """Whether it makes sense to wait for it."""
        service = self._services.get(name)
        if service is None or self._halted:
            return False
        return service.state in COMING or service.may_recover(falls)

    def _serves(self, name: str) -> bool:
        service = self._services.get(name)
        return service is not None and service.state in SERVES

    def _how(self, name: str) -> str:
        service = self._services.get(name)
        if service is None:
            return "failed: it is not on this node any more"
        if service.state in UP:
            return RUNNING
        return f"failed: {service.error or f'it is {service.state.value} still'}"[:300]

    async def _until(self, true: Callable[[], bool], end: float) -> None:
        """Wait until `true`, or until `end`."""
        try:
            async with asyncio.timeout(max(end - self._clock.monotonic(), 0.0)):
                while not true():
                    await self._pulse.wait()
        except TimeoutError:
            return

    def _raise_fault(self) -> None:
        """An error in our own code must not look like a module that waits."""
        for service in self._services.values():
            task = service.task
            if task is not None and task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def _end_forgotten(self) -> None:
        """End what a dead agent left of modules that are not here any more. The others see to it themselves."""
        if not self._layout.modules.is_dir():
            return
        left = [p for p in self._layout.modules.glob("*/process.json") if p.parent.name not in self._services]
        ends: list[Coroutine[Any, Any, str]] = [end_stray(p, self._clock.boot_id(), STRAY_S) for p in left]
        await asyncio.gather(*ends)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "no module"


def _version(module: Module | None) -> str:
    return module.release if module else "none"
