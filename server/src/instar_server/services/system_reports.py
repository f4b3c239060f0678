"""What a node says of its operating system in two slots (docs/protocol.md). One wrong field, and nothing is stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from instar.core.errors import InputError
from instar_server.services.history import Text64, Tx, Word

MAX_REPORT = 65_536  # bytes of a body
MAX_KEPT = 16_384  # bytes of what is kept of it
MOST_WHY = 2_000  # letters that are kept

Side = Literal["a", "b"]
NoSide = Literal["a", "b", ""]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Moment = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
Text128 = Annotated[str, msgspec.Meta(max_length=128)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{96})?$")]


class SlotSaid(msgspec.Struct, frozen=True):
    """`size` and `done` in bytes, `since` unix time."""

    version: Text64 = ""
    digest: Digest = ""
    state: Word = "unknown"
    size: Count = 0
    done: Count = 0
    since: Moment = 0.0
    why: Annotated[str, msgspec.Meta(max_length=16_384)] = ""
    booted_by: Literal["", "firmware", "kexec", "unknown"] = ""
    cold_boot_seen: bool = False


class SlotsSaid(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Both, or none: this node has no slots."""

    a: SlotSaid | None = None
    b: SlotSaid | None = None


class BootSaid(msgspec.Struct, frozen=True):
    """`order`: how a cold boot takes the slots; `once`: which the next boot tries once; `drift`: in words."""

    order: Annotated[list[Side], msgspec.Meta(max_length=8)] = []
    once: NoSide = ""
    tries: Annotated[dict[Side, Count], msgspec.Meta(max_length=2)] = {}
    drift: Annotated[list[Annotated[str, msgspec.Meta(max_length=500)]], msgspec.Meta(max_length=16)] = []


class UpdateSaid(msgspec.Struct, frozen=True):
    """The transaction that is under way; sizes in bytes."""

    tx: Tx
    generation: Count = 0
    step: Annotated[str, msgspec.Meta(pattern=r"^([a-z][a-z0-9-]{0,31})?$")] = ""
    slot: NoSide = ""
    done: Count = 0
    total: Count = 0
    fetched: Count = 0
    reused: Count = 0


class FaultSaid(msgspec.Struct, frozen=True):
    """Why its slots, or the way in which they are chosen, cannot be used."""

    code: Text64
    text: Annotated[str, msgspec.Meta(max_length=16_384)] = ""


class SystemReport(msgspec.Struct, frozen=True):
    v: Annotated[int, msgspec.Meta(ge=1, le=1)]
    running: NoSide
    slots: SlotsSaid
    hardware: Annotated[list[Text128], msgspec.Meta(max_length=16)] = []
    arch: Text64 = ""
    backend: Literal["", "firmware", "counting"] = ""
    boot: BootSaid = BootSaid()
    update: UpdateSaid | None = None
    error: FaultSaid | None = None

    def kept(self) -> dict[str, Any]:
        """What is stored of it. Raises InputError `report-too-large`."""
        body: dict[str, Any] = msgspec.to_builtins(self)
        del body["v"]
        for slot in body["slots"].values():
            slot["why"] = slot["why"][:MOST_WHY]
        if body["error"] is not None:
            body["error"]["text"] = body["error"]["text"][:MOST_WHY]
        size = len(msgspec.json.encode(body))
        if size > MAX_KEPT:
            text = f"cannot keep the report: expected at most {MAX_KEPT} bytes, got {size}"
            raise InputError("report-too-large", text)
        return body
