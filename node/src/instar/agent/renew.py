"""Renew the node's certificate before it lapses, in a one-shot child, so that the resident stays small.

A certificate that has lapsed still gets its successor, and nothing else: the channel waits until that was tried,
and it is tried again sooner than a renewal in time.
The channel reads key and certificate anew for each connection, so nobody needs to be told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from instar.agent.certificate import Validity, validity
from instar.core.backoff import Backoff
from instar.core.errors import InputError

LOOK_EVERY_S = 3600.0  # at most: the wall clock may jump
LEAST_WAIT_S = 1.0
CHILD_WITHIN_S = 60.0
LAPSED_RETRY_S = 10.0  # between two tries while nothing else works; up to twice as long
EXPIRED = "certificate-expired"

log = logging.getLogger("instar.agent")


class Renewer:
    """`command` is the one-shot. `wall` is unix time; `random01` draws from [0, 1]."""

    def __init__(
        self,
        certificate: Path,
        command: list[str],
        backoff: Backoff,
        random01: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._certificate, self._command, self._backoff = certificate, command, backoff
        self._random01, self._wall = random01, wall
        self._hurry, self._tried = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        spread01 = self._random01()
        while True:
            held = self.validity()
            left_s = LOOK_EVERY_S if held is None else held.renew_at(spread01) - self._wall()
            if left_s > 0 and not await self._hurried(min(max(left_s, LEAST_WAIT_S), LOOK_EVERY_S)):
                continue
            renewed = await self._renew()
            self._hurry.clear()
            self._tried.set()
            if renewed:
                self._backoff.reset()
                spread01 = self._random01()
            wait_s = self._backoff.next(self._random01())
            if not renewed and (left_s > 0 or self._lapsed()):
                wait_s = min(wait_s, LAPSED_RETRY_S * (1 + self._random01()))
            await asyncio.sleep(wait_s)

    async def before_channel(self) -> None:
        """At once while the certificate holds; else when its renewal was tried, however that ended. Bounded."""
        if not self._lapsed():
            return
        self._tried.clear()
        self._hurry.set()
        try:
            async with asyncio.timeout(CHILD_WITHIN_S + 2 * LAPSED_RETRY_S):
                await self._tried.wait()
        except TimeoutError:
            pass  # the server says what is wrong

    def refused(self, code: str) -> None:
        """The server has refused the channel. It knows the time better than a machine that was off."""
        if code == EXPIRED:
            self._hurry.set()

    def _lapsed(self) -> bool:
        held = self.validity()
        return held is not None and held.not_after <= self._wall()

    async def _hurried(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                return await self._hurry.wait()
        except TimeoutError:
            return False

    def validity(self) -> Validity | None:
        try:
            return validity(self._certificate.read_bytes())
        except (OSError, InputError) as error:
            log.warning("the node's certificate: %s", error)
            return None

    async def _renew(self) -> bool:
        from instar.agent.children import run_child  # seldom needed

        try:
            outcome = await run_child(self._command, b"", CHILD_WITHIN_S, 65_536)
        except OSError as error:
            log.warning("cannot renew the certificate: %s", error)
            return False
        if outcome.exit_code or outcome.signal or outcome.cut:
            words = outcome.stderr.strip().rpartition("\n")[2][:500]
            log.warning("cannot renew the certificate: %s", words or f"the helper was ended ({outcome.cut})")
            return False
        log.info("the certificate was renewed")
        return True
