"""What the calls about a node's operating system take and give. Times are unix seconds, sizes bytes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, WithJsonSchema

from instar.core.system import MODES
from instar_server.web.models import Body

_BUNDLE = {
    "type": "string",
    "description": "NAME-VERSION or os/NAME-VERSION.bundle, which is published; or an https URL that ends so, "
    "from which its bytes are then fetched.",
}
_ACTIVATION = {
    "enum": list(MODES),
    "type": "string",
    "description": "How the node comes to run it; none: not yet.",
}
Slot = Literal["a", "b"]
NoSlot = Literal["a", "b", ""]


class UpdateOsBody(Body):
    """What is wrong with the first two is said by the call itself (400 `invalid-argument`). `override_cold_boot`: also
    if the firmware was not seen to start what runs, and the slot that would be written is the only one that it was
    seen to start."""

    model_config = ConfigDict(json_schema_extra={"required": ["bundle", "activation"]})

    bundle: Annotated[Any, WithJsonSchema(_BUNDLE)] = None
    activation: Annotated[Any, WithJsonSchema(_ACTIVATION)] = None
    override_cold_boot: bool = False


class SystemUpdate(BaseModel):
    """One order. `state` stays open until the node has told its end; `phase` is a state of docs/transaction.md.

    `outcome`: '' while it is open, then `confirmed`, `installed, not active`, `confirmed, cold boot not seen`,
    `cancelled`, `lapsed` (the node has told nothing of it for 7 days), `left` (it was confirmed, and the node has left
    it since), `reverted` (it was active, and did not stay so), or, when it ended before it was active,
    `failed-precondition` or `unavailable`; `code` and `text` say why. `done` of `total` bytes of the image are in
    `slot`; `fetched` came over the network, `reused` from the running slot.
    """

    id: str
    node: str
    generation: int
    name: str
    version: str
    digest: str
    target: str
    source: str
    mode: Literal["none", "reboot", "kexec"]
    override: bool
    made: float
    made_by: str
    state: Literal["open", "confirmed", "reverted", "cancelled", "lapsed"]
    outcome: str
    tx: str
    phase: str
    slot: str
    code: str
    text: str
    done: int
    total: int
    fetched: int
    reused: int
    ended: float | None


class SystemSlot(BaseModel):
    """`state`: unknown, writing, installed, trial, good or bad. `booted_by`: firmware or kexec, when it was last
    started. `why`: how it came to its state."""

    version: str
    digest: str
    state: str
    size: int
    done: int
    since: float
    why: str
    booted_by: str
    cold_boot_seen: bool


class SystemBoot(BaseModel):
    """`order`: how a cold boot takes the slots; `once`: which one the next boot tries once; `tries`: left, where they
    are counted; `drift`: what is not as the node left it."""

    order: list[Slot]
    once: NoSlot
    tries: dict[str, int]
    drift: list[str]


class UnderWay(BaseModel):
    """The transaction that the node is at, whoever ordered it (`generation` 0: not this server)."""

    tx: str
    generation: int
    step: str
    slot: NoSlot
    done: int
    total: int
    fetched: int
    reused: int


class ColdBoot(BaseModel):
    """`missed`: the node has not begun within an hour of `at`, and does not begin any more."""

    at: float
    generation: int
    missed: bool


class Fault(BaseModel):
    code: str
    text: str


class System(BaseModel):
    """`told`: when the node last told of it, absent when it never has; what it told is empty then. `running`: the slot
    that is mounted as root, '' when it is none of the two. `error`: why the node cannot use its slots, or cannot read
    how it would boot. `updates`: the last ones, newest first. `cold_boot`: wanted, or missed, and not done."""

    node: str
    told: float | None
    running: NoSlot
    hardware: list[str]
    arch: str
    backend: Literal["firmware", "counting", ""]
    slots: dict[str, SystemSlot]
    boot: SystemBoot
    update: UnderWay | None
    error: Fault | None
    updates: list[SystemUpdate]
    cold_boot: ColdBoot | None


class ColdBootBody(Body):
    """`at`: now, if it is left out."""

    at: float | None = None
