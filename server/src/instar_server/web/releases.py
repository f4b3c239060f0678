"""Releases and the signed repository: upload, publish, hand out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Annotated, BinaryIO, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from instar.core.errors import InputError
from instar_server.domain.errors import NotFound, TooLarge
from instar_server.services.ports import NodeRelease, RecoveryCore, moment
from instar_server.web import models as m
from instar_server.web.callers import Operator, Services, Viewer, errors

router = APIRouter(tags=["releases"])

MAX_METADATA = 5_000_000  # bytes
CHUNK_WITHIN_S = 60.0
PIECE = 262_144  # bytes
BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
JSON_BYTES = {"content": {"application/json": {"schema": {"type": "object"}}}}


@router.get("/releases", responses=errors(401))
async def list_releases(services: Services, caller: Viewer) -> m.Releases:
    """The published node releases, the recovery cores, and the system bundles."""
    return m.Releases(
        releases=[m.Release(**asdict(release)) for release in services.releases.all()],
        cores=[m.Release(**asdict(core)) for core in services.cores.all()],
        bundles=[m.Release.model_validate(asdict(bundle)) for bundle in services.bundles.all()],
    )


@router.get(
    "/releases/{version}/parcel",
    response_class=StreamingResponse,
    responses={200: BYTES | {"description": "The parcel"}, **errors(401, 404, 422, 503)},
)
async def release_parcel(
    services: Services,
    caller: Operator,
    version: Annotated[m.Version, Path(description="A published version.")],
    kind: Annotated[Literal["node", "recovery"], Query(description="The node program or a core.")] = "node",
) -> StreamingResponse:
    """All that a node needs to install a release, in one file (docs/protocol.md). Its SHA-384, by which it is
    known, is in the header `Instar-SHA384`."""
    found: NodeRelease | RecoveryCore | None
    found = (services.releases if kind == "node" else services.cores).by_version(version)
    if found is None:
        raise NotFound("no-release", f"cannot make a parcel of {kind} {version}: it is not published")
    parcel = await services.parcels.parcel_of(found.target)
    file = await asyncio.to_thread(parcel.path.open, "rb", 0)
    headers = {
        "Content-Length": str(parcel.length), "Instar-SHA384": parcel.sha384,
        "Content-Disposition": f'attachment; filename="{kind}-{version}.parcel"',
    }  # fmt: skip
    return StreamingResponse(_chunks(file), media_type="application/octet-stream", headers=headers)


async def _chunks(file: BinaryIO) -> AsyncIterator[bytes]:
    """The file, a piece at a time; closed at the end."""
    try:
        while data := await asyncio.to_thread(file.read, PIECE):
            yield data
    finally:
        file.close()


@router.get("/modules", responses=errors(401))
async def list_modules(services: Services, caller: Viewer) -> m.Modules:
    """The published modules, by name, newest version first."""
    return m.Modules(modules=[m.Module(**asdict(module)) for module in services.modules.all()])


@router.put(
    "/blobs/{sha256}",
    responses=errors(400, 401, 403, 413, 422, 503),
    openapi_extra={"requestBody": {"required": True, **BYTES}},
)
async def upload_blob(services: Services, caller: Operator, sha256: m.Sha256, request: Request) -> m.Blob:
    """Store a file whose SHA-256 is `sha256`. Storing it again is no error."""
    temporary = services.repository.blobs.new_file()
    try:
        await _receive(request, temporary, services.max_upload)
        blob = await asyncio.to_thread(services.repository.blobs.add, temporary, sha256)
    finally:
        await asyncio.to_thread(temporary.unlink, True)
    return m.Blob(sha256=blob.sha256, length=blob.length)


async def _receive(request: Request, path: FilePath, limit: int) -> None:
    """Stream the body into a new file. Raises TooLarge, InputError `body-too-slow`."""
    size = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        chunks = aiter(request.stream())
        while True:
            try:
                async with asyncio.timeout(CHUNK_WITHIN_S):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise InputError(
                    "body-too-slow", f"cannot read the body: nothing for {CHUNK_WITHIN_S:g} s"
                ) from None
            size += len(chunk)
            if size > limit:
                text = f"cannot store the file: expected at most {limit} bytes, as max_upload of server.toml says"
                raise TooLarge("body-too-large", text)
            await asyncio.to_thread(file.write, chunk)


async def _metadata_body(request: Request) -> bytes:
    data = b""
    async with asyncio.timeout(CHUNK_WITHIN_S):
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_METADATA:
                raise TooLarge(
                    "body-too-large", f"cannot read metadata: expected at most {MAX_METADATA} bytes"
                )
    return data


@router.put(
    "/trust/targets",
    responses=errors(400, 401, 403, 413, 503),
    openapi_extra={"requestBody": {"required": True, **JSON_BYTES}},
)
async def publish_targets(services: Services, caller: Operator, request: Request) -> m.Published:
    """Serve this signed targets metadata; its blobs must be here. The same bytes again are no error."""
    data = await _metadata_body(request)
    published = await asyncio.to_thread(services.repository.publish_targets, data, moment(services.now()))
    return m.Published(**asdict(published))


@router.put(
    "/trust/root",
    responses=errors(400, 401, 403, 413, 503),
    openapi_extra={"requestBody": {"required": True, **JSON_BYTES}},
)
async def publish_root(services: Services, caller: Operator, request: Request) -> m.Published:
    """Serve the next version of the root metadata. Its own signatures decide, not the caller's role."""
    data = await _metadata_body(request)
    published = await asyncio.to_thread(services.repository.publish_root, data, moment(services.now()))
    return m.Published(**asdict(published))


@router.get("/trust", responses=errors(401))
async def trust_state(services: Services, caller: Viewer) -> m.Trust:
    """Version, expiry and threshold of every role that is served."""
    roles = await asyncio.to_thread(services.repository.status, moment(services.now()))
    return m.Trust(roles=[m.Role(**asdict(role)) for role in roles])


@router.get(
    "/trust/metadata/{file}",
    response_class=Response,
    responses={200: JSON_BYTES | {"description": "The very bytes"}, **errors(401, 404, 422)},
)
async def trust_metadata(services: Services, caller: Viewer, file: str) -> Response:
    """A metadata file as nodes get it; `root.json` and `targets.json` are the current ones."""
    name = file
    if file in ("root.json", "targets.json"):
        versions = {role.role: role.version for role in services.repository.status(moment(services.now()))}
        name = f"{versions.get(file.removesuffix('.json'), 0)}.{file}"
    data = await asyncio.to_thread(services.repository.metadata, name)
    if data is None:
        raise NotFound("no-metadata", f"cannot serve metadata {file[:80]!r}: there is none of this name")
    return Response(data, media_type="application/json")


@router.get(
    "/program",
    response_class=Response,
    responses={200: BYTES | {"description": "The program"}, **errors(400, 403, 404, 422, 429, 503)},
)
async def program(
    services: Services,
    request: Request,
    token: Annotated[
        str, Query(min_length=1, max_length=200, description="An enrolment token: its own right to ask.")
    ],
    group: Annotated[m.GroupName | None, Query(description="Must be the token's, if given.")] = None,
    version: Annotated[m.Version | None, Query(description="Else what is wanted for the group.")] = None,
) -> Response:
    """The one file that installs a node: the program with this server's configuration in it."""
    address = request.client.host if request.client else None
    found = await services.enrolment.check_token(token, address)
    if group is not None and group != found.group:
        raise InputError("wrong-group", f"cannot hand out the program: the token is for group {found.group}")
    release, data = await services.programs.make(found, token, version)
    headers = {"Content-Disposition": 'attachment; filename="instar.pyz"', "Instar-Version": release.version}
    return Response(data, media_type="application/octet-stream", headers=headers)
