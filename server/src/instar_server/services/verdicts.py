"""What the server says about a release that is rehearsed or on trial, and who waits to hear it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec

from instar.wire.messages import Job, Result
from instar_server.bus.api import FLEET, Bus, health_topic, verdict_topic
from instar_server.domain import names, verdicts
from instar_server.domain.errors import TooMany
from instar_server.domain.systems import LINE
from instar_server.domain.verdicts import Recorded, Verdict
from instar_server.services.ports import Chance, Now, Releases
from instar_server.services.presence import Presence
from instar_server.storage import work
from instar_server.storage.database import Database
from instar_server.storage.rows import JobRow

MAX_WAIT_S = 20.0
MAX_WAITERS = 4  # open questions of one node
PHASE_OF_PURPOSE = {"rehearsal": "rehearsal", "health": "trial"}


class Verdicts:
    def __init__(
        self, database: Database, bus: Bus, releases: Releases, presence: Presence, now: Now, chance: Chance
    ) -> None:
        self._database, self._bus, self._releases, self._presence = database, bus, releases, presence
        self._now, self._chance = now, chance
        self._waiting: Counter[str] = Counter()
        self._bells: set[asyncio.Event] = set()
        self._closed = False

    # ---- the job that decides

    async def begin(
        self, node: str, purpose: str, tx: str, version: str, digest: str, deadline_s: float
    ) -> Job | None:
        """The selftest job to send, stored first; None, and a verdict, when no such release is published."""
        if self._releases.by_program(version, digest) is None:
            await self.record(
                node, tx, PHASE_OF_PURPOSE[purpose], digest, verdicts.unknown_release(version, digest)
            )
            return None
        job_id, nonce = f"j-{self._chance(12)}", self._chance(16)
        row = JobRow(job_id, node, purpose, tx, digest, version, nonce, self._now(), None)
        async with self._database.write() as connection:
            await work.Jobs(connection).add(row)
        return Job(job_id, "selftest", purpose, {"nonce": nonce}, deadline_s)

    async def finish(self, node: str, result: Result) -> bool:
        """Store what came of a job, and the verdict that follows; a result that comes again changes nothing.

        True when it may be acknowledged; False when this node was never sent such a job.
        """
        now, verdict = self._now(), None
        async with self._database.write() as connection:
            jobs = work.Jobs(connection)
            job = await jobs.get(node, result.id[:40])
            if job is None:
                return False
            body: dict[str, Any] = msgspec.to_builtins(result)
            if await jobs.end(job.id, now, body) and job.purpose in PHASE_OF_PURPOSE:
                verdict = verdicts.judge_result(result, job.nonce, job.version, job.digest)
                recorded = Recorded(job.digest, verdict)
                await work.Verdicts(connection).put(
                    node, job.tx, PHASE_OF_PURPOSE[job.purpose], recorded, now
                )
        if verdict is not None:
            self._announce(node, job.tx, PHASE_OF_PURPOSE[job.purpose], verdict)
        return True

    async def no_reply(self, node: str, tx: str, digest: str, seconds: float) -> None:
        """A rehearsal's job was not answered while the connection was up."""
        await self.record(node, tx, "rehearsal", digest, verdicts.no_reply(seconds))

    async def record(self, node: str, tx: str, phase: str, digest: str, verdict: Verdict) -> None:
        async with self._database.write() as connection:
            await work.Verdicts(connection).put(node, tx, phase, Recorded(digest, verdict), self._now())
        self._announce(node, tx, phase, verdict)

    def _announce(self, node: str, tx: str, phase: str, verdict: Verdict) -> None:
        self._bus.publish(verdict_topic(node, tx), {"phase": phase})
        body = {"kind": "verdict", "node": node, "tx": tx, "phase": phase, "verdict": verdict.verdict}
        self._bus.publish(FLEET, body | {"code": verdict.code, "text": verdict.text})

    # ---- asking

    async def ask(
        self,
        node: str,
        line: str,
        phase: str,
        tx: str,
        digest: str,
        asking: tuple[str, str] | None,
        wait_s: float,
        boot_id: str = "",
    ) -> Verdict:
        """The verdict now, or as soon as it is not `wait`, within `wait_s` seconds (at most 20).

        `asking`: role and digest of the program that asks; `boot_id`, for the line `os`: of the boot that runs.
        Raises InputError, TooMany.
        """
        by_health = line == LINE or names.module_of(names.line(line)) is not None
        # Modules and systems are rehearsed by the node alone; the server is asked when they are on trial.
        names.one_of("phase", phase, ("trial",) if by_health else names.PHASES)
        names.transaction(tx), names.digest(digest)
        if line == LINE:
            names.boot_id(boot_id)
        if self._waiting[node] >= MAX_WAITERS:
            raise TooMany(
                "too-many-questions", f"cannot hold open more than {MAX_WAITERS} questions of {node}"
            )
        bell = asyncio.Event()
        topic = health_topic(node) if by_health else verdict_topic(node, tx)
        subscription = self._bus.subscribe(topic, lambda _message: bell.set())
        self._waiting[node] += 1
        self._bells.add(bell)
        try:
            within_s = min(wait_s, MAX_WAIT_S)
            return await self._ask(bell, node, line, phase, tx, digest, asking, within_s, boot_id)
        finally:
            self._bells.discard(bell)
            self._waiting[node] -= 1
            if not self._waiting[node]:
                del self._waiting[node]
            subscription.close()

    async def _ask(
        self,
        bell: asyncio.Event,
        node: str,
        line: str,
        phase: str,
        tx: str,
        digest: str,
        asking: tuple[str, str] | None,
        wait_s: float,
        boot_id: str,
    ) -> Verdict:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            bell.clear()
            verdict = await self._now_verdict(node, line, phase, tx, digest, asking, boot_id)
            left = until - loop.time()
            if verdict.verdict != verdicts.WAIT or left <= 0 or self._closed:
                return verdict
            try:
                async with asyncio.timeout(left):
                    await bell.wait()
            except TimeoutError:
                continue

    async def _now_verdict(
        self,
        node: str,
        line: str,
        phase: str,
        tx: str,
        digest: str,
        asking: tuple[str, str] | None,
        boot_id: str,
    ) -> Verdict:
        live = self._presence.get(node)
        if line == LINE:
            return verdicts.system_trial((live.boot_id, live.well) if live else None, boot_id)
        module = names.module_of(line)
        if module is not None:
            return verdicts.module_trial(module, digest, (live.modules, live.digests) if live else None)
        watched = "rehearsal" if phase == "rehearsal" or line == "updater" else "trial"
        async with self._database.read() as connection:
            stored = await work.Verdicts(connection).get(node, tx, watched)
        if phase == "rehearsal":
            return verdicts.rehearsal(stored, digest)
        if line == "updater":
            return verdicts.updater_trial(stored, digest, asking)
        return verdicts.agent_trial(stored, digest, (live.digest, live.tx) if live else None, tx)

    def close(self) -> None:
        """Answer everybody who waits."""
        self._closed = True
        for bell in self._bells:
            bell.set()
