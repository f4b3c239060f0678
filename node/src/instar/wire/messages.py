"""The control channel's messages (docs/protocol.md). Field order is not part of the protocol; names are.

Each class names its type in `T`; `BY_TYPE` finds the class for a frame's `"t"`.
A new field gets a default, so that older peers' frames still decode.
"""

from __future__ import annotations

from typing import Any, ClassVar

from instar.core.light import dataclass, field

PROTOCOL = 1
MAX_FRAME = 262_144  # bytes of one frame
HELLO_WITHIN_S = 10.0

# What a node may say instead of the digest that it has installed (requirement M4).
NEVER, FORCE = "0" * 96, "f" * 96  # it takes no native update; it takes one whatever it runs
NATIVE_FORCE = "native-force"  # the feature of a node that says FORCE, once for each wish
BLOCK_BOUNDS, WINDOW_BOUNDS = (1_024, 131_072), (1, 64)  # bytes, blocks


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of a node. `tx` names the transaction on trial (agent) or in rehearsal, else ''."""

    T: ClassVar[str] = "hello"
    v: int
    role: str  # agent | rehearsal | beacon
    node: str
    version: str
    digest: str  # program digest, SHA-384
    boot_id: str
    pid: int
    started: float  # unix time
    tx: str = ""
    os: str = ""
    arch: str = ""
    python: str = ""
    features: list[str] = field(default_factory=list)
    wake_port: int = 0  # TCP port that a poke is accepted on; 0: none
    built: str = ""  # when the program was built, ISO 8601 in UTC; '' when it does not say


@dataclass(frozen=True, slots=True)
class Welcome:
    T: ClassVar[str] = "welcome"
    v: int
    server: str  # the server's version
    ping_s: float
    health_s: float


@dataclass(frozen=True, slots=True)
class Look:
    T: ClassVar[str] = "look"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """Run `module` once with `args`; answer before `deadline_s` seconds have passed.

    `digest` is the module digest (trust/module.py), '' for one that rides in the program; `target` is the
    TUF path from which a module that is not on the disk is fetched. One that has not begun `lapse_s`
    seconds after it was received is not begun any more (0: it never lapses).
    """

    T: ClassVar[str] = "job"
    id: str
    module: str
    purpose: str = "job"  # job | rehearsal | health
    args: dict[str, Any] = field(default_factory=dict)
    deadline_s: float = 30.0
    version: str = ""
    digest: str = ""
    target: str = ""
    lapse_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Taken:
    """The job or command with this id is on the node's disk: it need not be sent again."""

    T: ClassVar[str] = "taken"
    id: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Do not begin the job, or end it; its result says which."""

    T: ClassVar[str] = "cancel"
    id: str


@dataclass(frozen=True, slots=True)
class Output:
    """What a job says while it runs. May be lost; `seq` counts from 1 for each job and shows gaps."""

    T: ClassVar[str] = "output"
    id: str
    seq: int
    kind: str  # log | progress
    text: str = ""
    fraction: float = -1.0  # of the whole, 0 to 1; -1: not told


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a job. `ok` means exit 0 and a reply; `reason` says why not."""

    T: ClassVar[str] = "result"
    id: str
    ok: bool
    reply: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0
    signal: int = 0
    seconds: float = 0.0
    max_rss: int = 0  # bytes
    stderr: str = ""  # its tail
    reason: str = ""
    code: str = ""  # why it is not ok, for machines (docs/protocol.md); '' when it is


@dataclass(frozen=True, slots=True)
class Command:
    """What the core itself does. `modules` are the ones to restart; none: all of them and, for
    `restart-agent`, the agent."""

    T: ClassVar[str] = "command"
    id: str
    type: str  # restart-agent | restart-module
    modules: list[str] = field(default_factory=list)
    origin: str = ""  # who asked: 'server:<token id>', 'local:<user id>'
    args: dict[str, Any] = field(default_factory=dict)
    within_s: float = 30.0  # for the whole


@dataclass(frozen=True, slots=True)
class CommandStatus:
    """Where a command stands. A final one is sent again until `ack`; the others may be lost."""

    T: ClassVar[str] = "command-status"
    id: str
    type: str
    status: str  # pending | in-progress | success | failure | timeout
    code: str = ""
    text: str = ""
    origin: str = ""
    modules: dict[str, str] = field(default_factory=dict)  # name -> how it went: stopped, killed, running, …
    asked: float = 0.0  # unix time
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class Ack:
    T: ClassVar[str] = "ack"
    id: str


@dataclass(frozen=True, slots=True)
class Health:
    """`modules` maps a service module's name to ok | starting | failed, `digests` to its module digest.
    `facts` is free for display."""

    T: ClassVar[str] = "health"
    ok: bool
    modules: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ping:
    T: ClassVar[str] = "ping"
    n: int = 0


@dataclass(frozen=True, slots=True)
class Pong:
    T: ClassVar[str] = "pong"
    n: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """The connection ends. `retry_after_s` is the least time to stay away."""

    T: ClassVar[str] = "refused"
    code: str
    message: str
    retry_after_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Error:
    """The last frame could not be used; the connection stays."""

    T: ClassVar[str] = "error"
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class UpdateOffer:
    """Native update: a parcel of `length` bytes is to come in blocks. `digest` is the program digest wanted.

    `sha384` is of the whole parcel, and what a cut transfer is known by when it goes on. `block` (bytes) and
    `window` (blocks under way) are the most that the server offers; `rate_bytes_s` 0 means no cap. `generation` is
    that of the wish that it is sent for; 0: for none.
    """

    T: ClassVar[str] = "update-offer"
    id: str
    line: str  # agent | updater | recovery
    version: str
    digest: str
    target: str
    length: int
    sha384: str
    block: int = 65_536
    window: int = 16
    rate_bytes_s: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True)
class UpdateHave:
    """The answer: the digest that is installed (or NEVER, FORCE), and how the blocks may come."""

    T: ClassVar[str] = "update-have"
    id: str
    digest: str
    have: int  # blocks of the agreed size that are on the disk already, in a row from the first
    block: int
    window: int
    rate_bytes_s: int = 0


@dataclass(frozen=True, slots=True)
class UpdateBlock:
    """Block `n`, counted from 0; `data` in base64. All but the last have the agreed size."""

    T: ClassVar[str] = "update-block"
    id: str
    n: int
    data: str


@dataclass(frozen=True, slots=True)
class UpdateAck:
    """So many blocks have come, in a row from the first."""

    T: ClassVar[str] = "update-ack"
    id: str
    n: int


@dataclass(frozen=True, slots=True)
class UpdateEnd:
    """After the last block: the SHA-384 of the whole."""

    T: ClassVar[str] = "update-end"
    id: str
    sha384: str


@dataclass(frozen=True, slots=True)
class UpdateState:
    """How a transfer ended on the node: `received` (whole, and its SHA-384 fits) or `failed`."""

    T: ClassVar[str] = "update-state"
    id: str
    state: str  # received | failed
    code: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class AgentUpdate:
    """Recovery: run the recovery core `core` (SHA-384 of its parcel), which fetches `url` and installs it."""

    T: ClassVar[str] = "agentupdate"
    id: str
    url: str  # of the release's archive: https://…, or a path on the channel's server
    sha384: str  # of the archive's bytes
    version: str
    digest: str
    target: str
    core: str
    lines: list[str] = field(default_factory=lambda: ["agent"])


@dataclass(frozen=True, slots=True)
class AgentUpdateProgress:
    T: ClassVar[str] = "agentupdate-progress"
    id: str
    phase: str
    percent: float = -1.0  # of this phase, 0 to 100; -1: not told
    text: str = ""


@dataclass(frozen=True, slots=True)
class AgentUpdateDownloaded:
    """The archive is there and its SHA-384 fits; now, and not before, the program is replaced."""

    T: ClassVar[str] = "agentupdatedownloaded"
    id: str
    sha384: str


@dataclass(frozen=True, slots=True)
class AgentUpdateEnded:
    """The last word of a recovery, where its agent lives to say it."""

    T: ClassVar[str] = "agentupdate-ended"
    id: str
    ok: bool
    code: str = ""
    text: str = ""


Message = (
    Hello | Welcome | Look | Job | Taken | Cancel | Output | Result | Command | CommandStatus
    | Ack | Health | Ping | Pong | Refused | Error
    | UpdateOffer | UpdateHave | UpdateBlock | UpdateAck | UpdateEnd | UpdateState
    | AgentUpdate | AgentUpdateProgress | AgentUpdateDownloaded | AgentUpdateEnded
)  # fmt: skip

BY_TYPE: dict[str, type[Message]] = {
    cls.T: cls
    for cls in (
        Hello, Welcome, Look, Job, Taken, Cancel, Output, Result, Command, CommandStatus,
        Ack, Health, Ping, Pong, Refused, Error,
        UpdateOffer, UpdateHave, UpdateBlock, UpdateAck, UpdateEnd, UpdateState,
        AgentUpdate, AgentUpdateProgress, AgentUpdateDownloaded, AgentUpdateEnded,
    )
}  # fmt: skip
