"""The server's side of a native update, as the protocol has it: offer, blocks within the window, end."""

from __future__ import annotations

import asyncio
import json
from binascii import b2a_base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from instar.wire.messages import UpdateAck, UpdateBlock, UpdateEnd, UpdateHave, UpdateOffer, UpdateState
from tests.agent.fleet import Connection, Place
from tests.node.parcels import blocks


def block(offer_id: str, n: int, data: bytes) -> UpdateBlock:
    return UpdateBlock(offer_id, n, b2a_base64(data, newline=False).decode())


async def ask(connection: Connection, offer: UpdateOffer) -> UpdateHave:
    await connection.send(offer)
    have = await connection.expect(UpdateHave)
    assert have.id == offer.id
    return have


async def send_blocks(
    connection: Connection, have: UpdateHave, data: bytes, until: int = 1 << 40
) -> list[int]:
    """Blocks from where the node has none, up to block `until`; what was acknowledged."""
    each = blocks(data, have.block)
    acked, sent, last, heard = have.have, have.have, min(len(each), until), [have.have]
    while sent < last:
        while sent < min(last, acked + have.window):
            await connection.send(block(have.id, sent, each[sent]))
            sent += 1
        if sent < last or last == len(each):
            acked = await _ack(connection, have.id, heard)
    while last == len(each) and acked < last:
        acked = await _ack(connection, have.id, heard)
    return heard


async def _ack(connection: Connection, offer_id: str, heard: list[int]) -> int:
    ack = await connection.expect(UpdateAck, 30)
    assert ack.id == offer_id
    assert ack.n > heard[-1] or heard == [ack.n]
    heard.append(ack.n)
    return ack.n


async def finish(connection: Connection, offer: UpdateOffer, within_s: float = 30) -> UpdateState:
    await connection.send(UpdateEnd(offer.id, offer.sha384))
    return await connection.expect(UpdateState, within_s)


async def transfer(connection: Connection, offer: UpdateOffer, data: bytes) -> UpdateState:
    """The whole of it."""
    have = await ask(connection, offer)
    await send_blocks(connection, have, data)
    return await finish(connection, offer)


@asynccontextmanager
async def updater(place: Place) -> AsyncIterator[asyncio.Queue[object]]:
    """Stands in for the updater; what it was asked for."""
    asked: asyncio.Queue[object] = asyncio.Queue()

    async def heed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.put_nowait(json.loads(await reader.readline()))
        writer.write(b'{"ok": true}\n')
        await writer.drain()
        writer.close()

    place.layout.run.mkdir(exist_ok=True)
    listener = await asyncio.start_unix_server(heed, place.layout.socket("updater"))
    try:
        yield asked
    finally:
        listener.close()
