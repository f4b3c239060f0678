"""The API's socket: what becomes of a connection that a client keeps."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI

from instar_server.web.listener import WebListener

ASK = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"
IDLE_S = 5.5  # longer than our own client keeps one


async def test_the_server_is_not_the_first_to_close_a_kept_connection() -> None:
    """Else it may do so just as the next request comes, which then has no answer."""
    listener = WebListener(FastAPI(), None)
    port = await listener.start("127.0.0.1", 0)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for wait_s in (0.0, IDLE_S):
            await asyncio.sleep(wait_s)
            writer.write(ASK)
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 404 ")
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.split(b"content-length: ")[1].split()[0]))
        writer.close()
    finally:
        await listener.stop(5.0)
