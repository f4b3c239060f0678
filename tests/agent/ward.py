"""A real agent that has a recovery core, a small one of ours, and what stands in for the program that verifies it."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import signal
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import pytest

from instar.wire.codec import decode
from instar.wire.messages import (
    AgentUpdate,
    AgentUpdateDownloaded,
    AgentUpdateEnded,
    AgentUpdateProgress,
    Message,
)
from tests.agent.fleet import Connection, Place, Server
from tests.agent.sending import transfer
from tests.node.parcels import DIGEST, offer, parcel

TARGET = "recovery/core-1.1.0.pyz"
CORE = r"""
import json, os, subprocess, sys, time
arguments = sys.argv[1:]
state = arguments[arguments.index("--state") + 1]
order = json.load(open(arguments[arguments.index("--order") + 1]))
with open(os.path.join(state, "core.json"), "w") as file:
    said = {"argv": arguments, "order": order, "pid": os.getpid(), "sid": os.getsid(0), "cwd": os.getcwd(),
            "flags": [sys.flags.isolated, sys.flags.no_site], "fds": sorted(os.listdir("/proc/self/fd")),
            "environ": dict(os.environ)}
    json.dump(said, file)
os.rename(os.path.join(state, "core.json"), os.path.join(state, "core.said"))
try: act = json.load(open(os.path.join(state, "act.json")))
except FileNotFoundError: act = {}
def say(line):
    try: print(line if isinstance(line, str) else json.dumps(line), flush=True)
    except BrokenPipeError: pass
if act.get("child"):
    child = subprocess.Popen(["sleep", "600"])
    with open(os.path.join(state, "child.new"), "w") as file: file.write(str(child.pid))
    os.rename(os.path.join(state, "child.new"), os.path.join(state, "child"))
for line in act.get("says", []): say(line)
print(act.get("stderr", ""), file=sys.stderr, flush=True)
time.sleep(act.get("sleep_s", 0))
while act.get("hold") and not os.path.exists(os.path.join(state, "go")): time.sleep(0.02)
say({"progress": {"phase": "late", "percent": 1, "text": ""}})
if act.get("end"):
    open(os.path.join(state, "done"), "w").write("done")
if "ended" in act: say({"ended": act["ended"]})
os._exit(act.get("exit", 0))
"""

# Stands in for the launcher's program: says what the test wrote down, or that it does not know the question.
LAUNCHER = r"""
import json, os, sys
state = sys.argv[sys.argv.index("--state") + 1]
try: said = open(os.path.join(state, "signed.json")).read()
except FileNotFoundError: sys.exit("usage: instar verify: unrecognized arguments: --from")
with open(os.path.join(state, "asked.json"), "w") as file: json.dump(sys.argv[1:], file)
print(said)
"""


def zipapp(source: str = CORE) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("__main__.py", source)
    return out.getvalue()


ARCHIVE = zipapp()
WHOLE = parcel(ARCHIVE, kind="recovery")
CORE_SHA384 = hashlib.sha384(WHOLE).hexdigest()
ORDER = AgentUpdate(
    id="r-1",
    url="/v1/targets/node/instar-1.1.0.tar.gz",
    sha384="cd" * 48,
    version="1.1.0",
    digest=DIGEST,
    target="node/instar-1.1.0.tar.gz",
    core=CORE_SHA384,
)
GOOD = {"ok": True, "code": "", "text": "all lines done"}


def signed(archive: bytes = ARCHIVE, kind: str = "recovery") -> dict[str, Any]:
    """What a verify says of a good core."""
    hashes = {"sha256": hashlib.sha256(archive).hexdigest()}
    target = {"path": TARGET, "length": len(archive), "hashes": hashes, "custom": {"kind": kind}}
    return {"ok": True, "target": target}


class Ward:
    """A node with a core, and how it is to act."""

    def __init__(self, place: Place, connection: Connection) -> None:
        self.place, self.connection, self.state = place, connection, place.layout.state

    def act(self, **act: Any) -> None:
        (self.state / "act.json").write_text(json.dumps(act))

    def go(self) -> None:
        """Let a core go on that holds."""
        (self.state / "go").touch()

    def signed(self, answer: dict[str, Any]) -> None:
        (self.state / "signed.json").write_text(json.dumps(answer))

    async def words(self, until: type[Message] = AgentUpdateEnded) -> list[Message]:
        """What the node says of recoveries, up to the first `until`."""
        found: list[Message] = []
        kinds = (AgentUpdateProgress, AgentUpdateDownloaded, AgentUpdateEnded)
        async with asyncio.timeout(60):
            while not found or not isinstance(found[-1], until):
                message = decode((await self.connection.socket.receive()).data)
                if isinstance(message, (*kinds, until)):
                    found.append(message)
        return found

    async def recover(self, order: AgentUpdate = ORDER) -> AgentUpdateEnded:
        await self.connection.send(order)
        ended = (await self.words())[-1]
        assert isinstance(ended, AgentUpdateEnded)
        assert ended.id == order.id
        return ended

    async def core(self) -> dict[str, Any]:
        """What the core that runs, or ran, found."""
        async with asyncio.timeout(60):
            while not (self.state / "core.said").exists():
                await asyncio.sleep(0.01)
        said: dict[str, Any] = json.loads((self.state / "core.said").read_text())
        return said


@pytest.fixture
async def ward(place: Place, server: Server) -> AsyncIterator[Ward]:
    place.layout.launcher.parent.mkdir()
    place.layout.launcher.write_text(LAUNCHER)
    await place.start()
    made = Ward(place, await server.connection())
    wanted = offer(WHOLE, line="recovery", target=TARGET, block=65_536)
    assert (await transfer(made.connection, wanted, WHOLE)).state == "received"
    made.signed(signed())
    yield made
    if (made.state / "core.said").exists():
        end_session((await made.core())["sid"])


def end_session(leader: int) -> None:
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.getsid(int(name)) == leader:
                os.kill(int(name), signal.SIGKILL)
        except ProcessLookupError:
            continue
