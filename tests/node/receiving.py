"""What the tests of parcels on a node's disk share: one parcel, and a place for it to come to."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from instar.host.blocks import Receiving
from instar.host.clock import Clock
from instar.host.incoming import Incoming
from tests.node.parcels import blocks, parcel

ARCHIVE = os.urandom(50_000)
WHOLE = parcel(ARCHIVE)
SHA384 = hashlib.sha384(WHOLE).hexdigest()


class Booted(Clock):
    """A clock of some boot."""

    def __init__(self, boot_id: str = "boot-1") -> None:
        self._boot_id = boot_id

    def boot_id(self) -> str:
        return self._boot_id


@pytest.fixture
def incoming(tmp_path: Path) -> Incoming:
    return Incoming(tmp_path / "incoming", clock=Booted())


def names(incoming: Incoming) -> list[str]:
    return sorted(os.listdir(incoming.folder)) if incoming.folder.exists() else []


def receive(receiving: Receiving, data: bytes, count: int = 1 << 30) -> None:
    each = blocks(data, receiving.block_size)
    for number in range(receiving.blocks, min(len(each), receiving.blocks + count)):
        receiving.block(number, each[number])


def another(number: int, **changes: Any) -> tuple[bytes, str]:
    data = parcel(b"archive %d" % number, digest=f"{number:096x}", **changes)
    return data, hashlib.sha384(data).hexdigest()
