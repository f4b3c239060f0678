"""How a played node takes a parcel, and what it finds in one. Written from docs/protocol.md alone."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from typing import Any

from tests.server.world import WITHIN_S, Channel, World

INSTALLED = "ab" * 48  # what the played node says that it runs


@dataclass
class Taken:
    """A parcel as it came. `most` is how many blocks were ever under way."""

    offer: dict[str, Any]
    data: bytes = b""
    most: int = 0
    numbers: list[int] = field(default_factory=list)

    @property
    def said(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.members["parcel.json"])
        return found

    @property
    def members(self) -> dict[str, bytes]:
        with tarfile.open(fileobj=io.BytesIO(self.data), mode="r:") as tar:
            return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


async def offer(channel: Channel, within_s: float = WITHIN_S) -> dict[str, Any]:
    """The next offer. One that is called off before is let go, as a node does."""
    while (frame := await channel.read(within_s))["t"] in ("look", "update-block", "update-end"):
        if frame["t"] == "update-end":
            await channel.send("update-state", id=frame["id"], state="failed", code="incomplete-parcel")
    assert frame["t"] == "update-offer", frame
    return frame


async def have(channel: Channel, offered: dict[str, Any], **said: Any) -> None:
    """The answer to an offer, as generous as the offer unless `said` says otherwise."""
    answer = {"digest": INSTALLED, "have": 0, "block": offered["block"], "window": offered["window"], **said}
    await channel.send("update-have", id=offered["id"], **answer)


async def take(
    channel: Channel, offered: dict[str, Any] | None = None, *, start: bytes = b"", every: int = 1,
    stop_after: int = 0, **said: Any,
) -> Taken:  # fmt: skip
    """Take a whole parcel, acknowledging every `every` blocks; or leave after `stop_after` of them.

    `start` is what was there before.
    """
    offered = offered or await offer(channel)
    taken = Taken(offered, start)
    size = min(offered["block"], said.get("block", offered["block"]))
    acked = len(start) // size
    await have(channel, offered, **{"have": acked, **said})
    while True:
        frame = await channel.read()
        if frame["t"] in ("look", "pong"):
            continue
        assert frame["id"] == offered["id"], frame
        if frame["t"] == "update-end":
            assert frame["sha384"] == hashlib.sha384(taken.data).hexdigest() == offered["sha384"]
            assert len(taken.data) == offered["length"]
            await channel.send("update-state", id=offered["id"], state="received")
            return taken
        assert frame["t"] == "update-block", frame
        block = base64.b64decode(frame["data"], validate=True)
        assert frame["n"] == len(taken.data) // size
        assert len(block) == min(size, offered["length"] - len(taken.data))
        taken.data += block
        taken.numbers.append(frame["n"])
        taken.most = max(taken.most, len(taken.numbers) + len(start) // size - acked)
        if len(taken.numbers) == stop_after:
            return taken
        done = len(taken.data) == offered["length"]
        if len(taken.numbers) % every == 0 or done:
            acked = frame["n"] + 1
            await channel.send("update-ack", id=offered["id"], n=acked)


async def transfer(world: World, node: str) -> dict[str, Any]:
    found: dict[str, Any] = await asyncio.to_thread(world.ask, "GET", f"/nodes/{node}/transfer")
    return found


async def state(world: World, node: str, *states: str, within_s: float = WITHIN_S) -> dict[str, Any]:
    """The transfer once it is in one of these states."""
    until = asyncio.get_running_loop().time() + within_s
    while (view := await transfer(world, node))["state"] not in states:
        assert asyncio.get_running_loop().time() < until, view
        await asyncio.sleep(0.05)
    return view
