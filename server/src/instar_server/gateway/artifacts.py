"""TUF metadata and targets. Targets may be fetched in ranges and resumed; their names hold their digest.

They may have a port of their own. The port of the channel then refuses them, except to a recovery core, which
fetches where the channel is.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from aiohttp import web

from instar_server.domain import ranges
from instar_server.domain.errors import NotFound, TooMany
from instar_server.gateway.answers import error_answer
from instar_server.gateway.identity import peer
from instar_server.trust.repository import Repository

CHUNK = 131_072  # bytes
CHUNK_WITHIN_S = 60.0  # a client that takes longer for one chunk is cut off; it can resume
MAX_TRANSFERS = 4  # of one node at a time

_PREFIX = re.compile(r"([0-9a-f]{64})\.")


class Artifacts:
    """`place` is where they are (https://host:port) when that is another port than this one; `serves` then says
    which node may have which target (or, with '', metadata) here all the same."""

    def __init__(
        self, repository: Repository, serves: Callable[[str, str], bool] | None = None, place: str = ""
    ) -> None:
        self._repository, self._serves, self.place = repository, serves, place
        self._transfers: Counter[str] = Counter()

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/metadata/{file}", self.metadata), web.get("/v1/targets/{path:.+}", self.target)]

    def _refusal(self, request: web.Request, path: str) -> web.Response | None:
        if not self.place or (self._serves is not None and self._serves(peer(request).node, path)):
            return None
        text = f"cannot serve {request.path[:200]!r} here: metadata and targets are at {self.place}"
        return error_answer(421, "other-port", text)

    async def metadata(self, request: web.Request) -> web.Response:
        refusal = self._refusal(request, "")
        if refusal is not None:
            return refusal
        name = request.match_info["file"]
        data = await asyncio.to_thread(self._repository.metadata, name)
        if data is None:
            raise NotFound("no-metadata", f"cannot serve metadata {name[:80]!r}: there is none of this name")
        return web.Response(body=data, content_type="application/json")

    async def target(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["path"]
        refusal = self._refusal(request, name)
        if refusal is not None:
            return refusal
        path = await asyncio.to_thread(self._repository.target_file, name)
        match = _PREFIX.match(path.name) if path is not None else None
        if path is None or match is None:
            raise NotFound("no-target", f"cannot serve target {name[:200]!r}: there is none of this name")
        node = peer(request).node
        if self._transfers[node] >= MAX_TRANSFERS:
            raise TooMany(
                "too-many-transfers", f"cannot serve more than {MAX_TRANSFERS} transfers of {node} at once"
            )
        self._transfers[node] += 1
        try:
            return await _send_file(request, path, f'"{match[1]}"')
        finally:
            self._transfers[node] -= 1
            if not self._transfers[node]:
                del self._transfers[node]


async def _send_file(request: web.Request, path: Path, etag: str) -> web.StreamResponse:
    file = await asyncio.to_thread(path.open, "rb")
    try:
        size = await asyncio.to_thread(file.seek, 0, 2)
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "no-transform, immutable"}
        start, end, status = 0, size, 200
        if "Range" in request.headers and ranges.still_same(request.headers.get("If-Range"), etag):
            part = ranges.parse(request.headers["Range"], size)
            if part == "unsatisfiable":
                answer = error_answer(
                    416, "range-not-satisfiable", f"cannot serve: the target has {size} bytes"
                )
                answer.headers["Content-Range"] = f"bytes */{size}"
                return answer
            if part is not None:
                start, end = part
                status = 206
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        response = web.StreamResponse(status=status, headers=headers)
        response.content_type = "application/octet-stream"
        response.content_length = end - start
        await response.prepare(request)
        if request.method != "HEAD":
            await _copy(response, file, start, end)
        return response
    finally:
        await asyncio.to_thread(file.close)


async def _copy(response: web.StreamResponse, file: BinaryIO, start: int, end: int) -> None:
    """Send bytes start..end, a chunk at a time. Raises TimeoutError when the client is too slow."""
    await asyncio.to_thread(file.seek, start)
    left = end - start
    while left > 0:
        data = await asyncio.to_thread(file.read, min(CHUNK, left))
        if not data:
            raise ConnectionResetError("the file became shorter")  # the client sees a cut, and resumes
        left -= len(data)
        async with asyncio.timeout(CHUNK_WITHIN_S):
            await response.write(data)
