"""The agent's end of the fork server: `instar.pyz runner --warm`, which has all imported that a runner needs.

    agent        {"n": 7} with [the runner's end of its control line, the end of its stderr pipe] and, where
                 it is to go into a cgroup before anything else, [a descriptor of its cgroup.procs]
    fork server  {"n": 7, "pid": 4711}   or, when it could not fork, {"n": 7, "error": "…"}
                 {"n": 7, "pid": 4711, "status": 0, "max_rss": bytes, "cpu_s": seconds}   once it was waited for

One datagram each, on a SOCK_SEQPACKET pair. It ends when its end is closed. When it dies, the kernel
kills the runners that it forked (PR_SET_PDEATHSIG); how they ended is not known then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import struct
from pathlib import Path
from typing import Any

from instar.agent.control import Tail
from instar.agent.spawn import STDERR_TAIL, ColdChild, Ends, Usage, environment_of_all, open_pidfd, spawn

MOST_BYTES = 65_536  # of one datagram
END_WITHIN_S = 2.0  # for a fork server that was told to end
LOST_POLL_S = 0.05

log = logging.getLogger("instar.agent")


class WarmChild:
    """A child of the fork server. Its pid is known once `forked` is done."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.forked: asyncio.Future[int] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.pid = 0
        self._pidfd = -1
        self._usage: Usage | None = None
        self._lost = False
        self._abandoned = False

    def abandon(self) -> None:
        """Nobody waits for it any more. Its control line is closed: so it ends by itself, once it is forked."""
        self._abandoned = True
        if self.ended.done():
            self.close()

    def kill(self) -> None:
        """By its pidfd: the fork server may reap it at any time, and its number become another's."""
        with contextlib.suppress(OSError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            elif self.pid and not self.ended.done():
                os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> Usage | None:
        return self._usage

    def close(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def lost(self) -> bool:
        return self._lost

    # --- what the fork server said of it

    def was_forked(self, pid: int) -> None:
        if not self.forked.done():
            self.pid, self._pidfd = pid, open_pidfd(pid)
            self.forked.set_result(pid)

    def was_not_forked(self, error: OSError) -> None:
        if not self.forked.done() and not self._abandoned:  # else nobody would take the exception
            self.forked.set_exception(error)

    def has_ended(self, usage: Usage) -> None:
        self._usage = usage
        if not self.ended.done():
            self.ended.set_result(None)
        if self._abandoned:
            self.close()

    def lose(self) -> None:
        """The fork server is gone: kill it to be sure, and wait for that."""
        self.was_not_forked(OSError("the fork server has ended"))
        if self.ended.done():
            return
        self._lost = True
        self.kill()
        if self._pidfd >= 0:
            asyncio.get_running_loop().add_reader(self._pidfd, self._mark_ended)
        else:
            self.ended.set_result(None)

    def _mark_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        if not self.ended.done():
            self.ended.set_result(None)
        if self._abandoned:
            self.close()


class ForkServer:
    """A running one. Raises OSError when it cannot be started."""

    def __init__(self, command: list[str]) -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        self._socket = mine
        self._tail = Tail(read_end, STDERR_TAIL)
        self._children: dict[int, WarmChild] = {}
        self._next = 0
        self.alive = True
        mine.setblocking(False)
        try:
            words = [*command, "--warm"]
            pid = spawn(words, its.fileno(), write_end, Path("/"), environment_of_all())
        except OSError:
            self.alive = False
            mine.close()
            self._tail.close()
            raise
        finally:
            its.close()
            os.close(write_end)
        self._process = ColdChild(pid)
        asyncio.get_running_loop().add_reader(mine.fileno(), self._readable)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, ends: Ends, entrance: int = -1) -> WarmChild:
        """Ask for a child, which goes into the cgroup of `entrance` by itself. Raises OSError when it cannot
        even be asked.

        `forked` of the child ends in BlockingIOError when the fork server lives, but cannot fork now.
        """
        self._next += 1
        given = [ends.line.fileno(), ends.stderr, *([entrance] if entrance >= 0 else [])]
        rights = struct.pack(f"{len(given)}i", *given)
        message = json.dumps({"n": self._next}).encode()
        self._socket.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        child = self._children[self._next] = WarmChild()
        return child

    async def close(self) -> None:
        """Tell it to end, and wait for that; the runners that it has are killed. Idempotent."""
        self._over("")
        if not self._process.ended.done():
            await asyncio.wait([self._process.ended], timeout=END_WITHIN_S)
        if not self._process.ended.done():
            self._process.kill()
            await asyncio.wait([self._process.ended], timeout=END_WITHIN_S)
        self._process.reap()
        self._process.close()
        self._tail.close()

    def _readable(self) -> None:
        while self.alive:
            try:
                data = self._socket.recv(MOST_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._over(str(error))
                return
            if not data:
                self._over("it has ended")
                return
            try:
                self._heed(json.loads(data))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self._over(f"it said what nobody understands: {error!a:.100}")

    def _heed(self, message: dict[str, Any]) -> None:
        number = int(message["n"])
        child = self._children.get(number)
        if child is None:
            return
        if "error" in message:
            del self._children[number]
            child.was_not_forked(BlockingIOError(f"the fork server said {message['error']!a:.200}"))
        elif "status" in message:
            del self._children[number]
            child.was_forked(int(message["pid"]))
            usage = Usage(int(message["status"]), int(message["max_rss"]), float(message["cpu_s"]))
            child.has_ended(usage)
        else:
            child.was_forked(int(message["pid"]))

    def _over(self, why: str) -> None:
        """It is not used any more."""
        if not self.alive:
            return
        self.alive = False
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        if why:
            self._process.kill()
            self._tail.drain()
            log.warning("the fork server is lost: %s %s", why, ascii(self._tail.text()[-300:]))
        for child in self._children.values():
            child.lose()
        self._children.clear()
