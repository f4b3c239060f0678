"""Parcels for tests, sound ones and others, written by the standard library's tar writer."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

from instar.wire.messages import UpdateOffer

DIGEST = "ab" * 48
METADATA = {
    "metadata/1.root.json": b'{"root": 1}',
    "metadata/2.root.json": b'{"root": 2}',
    "metadata/timestamp.json": b'{"timestamp": 5}',
    "metadata/5.snapshot.json": b'{"snapshot": 5}',
    "metadata/4.targets.json": b'{"targets": 4}',
}
Change = Callable[[tarfile.TarInfo], tarfile.TarInfo]


def record(archive: bytes, **changes: Any) -> dict[str, Any]:
    """What parcel.json says of `archive`; a change to None leaves the field out."""
    kind = changes.get("kind", "node")
    name = "instar-1.1.0.tar.gz" if kind == "node" else "core-1.1.0.pyz"
    said = {
        "format": 1,
        "kind": kind,
        "version": "1.1.0",
        "digest": DIGEST,
        "target": f"{kind}/{name}",
        "length": len(archive),
        "sha256": hashlib.sha256(archive).hexdigest(),
        **changes,
    }
    return {name: value for name, value in said.items() if value is not None}


def pack(
    files: list[tuple[str, bytes]], change: dict[str, Change] | None = None, form: int = tarfile.USTAR_FORMAT
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change and name in change:
                info = change[name](info)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return out.getvalue()


def parcel(
    archive: bytes = b"archive" * 999, metadata: dict[str, bytes] | None = None, **changes: Any
) -> bytes:
    files = [("parcel.json", json.dumps(record(archive, **changes)).encode())]
    files += list((METADATA if metadata is None else metadata).items())
    return pack([*files, ("archive", archive)])


def offer(data: bytes, **changes: Any) -> UpdateOffer:
    """As a server offers `data`."""
    fields: dict[str, Any] = {
        "id": "u-1",
        "line": "agent",
        "version": "1.1.0",
        "digest": DIGEST,
        "target": "node/instar-1.1.0.tar.gz",
        "length": len(data),
        "sha384": hashlib.sha384(data).hexdigest(),
        "block": 4096,
        "window": 8,
        **changes,
    }
    return UpdateOffer(**fields)


def blocks(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]
