"""The rehearsal: take the server's test job through the whole path, without lock, listener or local API.

Good is only: welcome, one job, run by a real runner process of this program, result sent and
acknowledged, and then `refused` with the code `rehearsal-over`. The verdict is the server's.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from instar.agent.dial import Dialer
from instar.agent.link import Incoming, Link, open_link
from instar.agent.runners import Runners
from instar.agent.running import run_job
from instar.core.errors import InstarError, ReleaseError, ServerRefused, ServerUnreachable
from instar.host.program import Program
from instar.wire.messages import Ack, Hello, Job, Ping, Pong, Refused, Result, Welcome

Kind = TypeVar("Kind", Welcome, Job, Ack, Refused)
OVER = "rehearsal-over"
READ_WITHIN_S = 5.0  # of one read; the whole has its own bound


async def rehearse(dialer: Dialer, program: Program, hello: Hello, within_s: float) -> None:
    """Raises InstarError unless the rehearsal came to its good end within `within_s`."""
    try:
        async with asyncio.timeout(within_s):
            link = await open_link(dialer, program.header("rehearsal"))
            try:
                await _Rehearsal(link, program).play(hello)
            finally:
                await link.close()
    except TimeoutError as error:
        text = f"cannot rehearse: no end within {within_s:g} s"
        raise ServerUnreachable("rehearsal-timeout", text) from error


class _Rehearsal:
    def __init__(self, link: Link, program: Program) -> None:
        self._link, self._program = link, program
        self._came: list[Incoming] = []

    async def play(self, hello: Hello) -> None:
        self._link.send(hello)
        await self._expect(Welcome)
        job = await self._expect(Job)
        if job.purpose != "rehearsal":
            text = f"cannot rehearse: expected a rehearsal job, got {job.purpose!a:.40}"
            raise InstarError("wrong-job", text)
        # Cold, and where this process is: nothing of the machine's is touched for a test.
        runners = Runners(self._program.command("runner"), grouped=False)
        result = await run_job(job, runners, warm=False)
        self._link.send(result)
        await self._end(result)

    async def _end(self, result: Result) -> None:
        """The acknowledgement, then the end of the rehearsal. A job that failed is the release's fault."""
        ack = await self._expect(Ack)
        if ack.id != result.id:
            text = f"cannot rehearse: expected ack {result.id}, got {ack.id!a:.80}"
            raise InstarError("wrong-ack", text)
        over = await self._expect(Refused)
        if over.code != OVER:
            text = f"cannot rehearse: the server said {over.message!a:.300}"
            raise ServerRefused(over.code[:64], text)
        if not result.ok:
            raise ReleaseError("job-failed", f"cannot rehearse: {result.reason} ({result.code})")

    async def _expect(self, kind: type[Kind]) -> Kind:
        """The next message of `kind`. A refusal in its place is raised, pings are answered."""
        while True:
            while self._came:
                message = self._came.pop(0)
                if isinstance(message, kind):
                    return message
                if isinstance(message, Ping):
                    self._link.send(Pong(message.n))
                elif isinstance(message, Refused):
                    text = f"cannot rehearse: expected '{kind.T}', got refused: {message.message!a:.300}"
                    raise ServerRefused(message.code[:64], text)
            self._came = await self._link.receive(READ_WITHIN_S)
