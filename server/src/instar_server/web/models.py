"""What the API takes and gives. Times are unix seconds, sizes bytes, digests lower-case hexadecimal."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from instar_server.domain import names

NodeId = Annotated[str, StringConstraints(pattern=names.NODE_PATTERN)]
GroupName = Annotated[str, StringConstraints(pattern=names.GROUP_PATTERN)]
Version = Annotated[str, StringConstraints(pattern=names.VERSION_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=names.SHA256_PATTERN)]
Serial = Annotated[str, StringConstraints(pattern=r"^[0-9A-F]{1,40}$")]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,16}$")]
Label = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
# JSON knows no integers: 3.0 is one for a schema.
Whole = BeforeValidator(
    lambda value: int(value) if isinstance(value, float) and value.is_integer() else value
)
Line = Annotated[str, StringConstraints(pattern=names.LINE_PATTERN, max_length=names.MOST_LINE)]
Scope = Literal["group", "node"]
Via = Literal["pull", "native", "recovery"]


class Body(BaseModel):
    """A request body: unknown fields are refused, so that a misspelt one is not silently without effect."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorInfo(BaseModel):
    code: str
    message: str


class ErrorBody(BaseModel):
    error: ErrorInfo


class Program(BaseModel):
    version: str
    digest: str


class Transaction(BaseModel):
    """The last one that the node told of. `phase` 'lapsed': nothing was heard of it for too long."""

    tx: str
    line: str
    phase: str
    version: str
    reason_code: str
    reason_text: str
    at: float | None


class Wanted(BaseModel):
    version: str
    digest: str
    generation: int
    scope: Scope
    via: Via


class Node(BaseModel):
    """`beacon`: its launcher calls for help, since no release of the agent runs there. `built`: when the agent's
    program was built, as that says itself ('' when it does not)."""

    id: str
    group: str
    state: Literal["connected", "beacon", "offline", "never-seen", "revoked"]
    enrolled: float
    connected_since: float | None
    last_seen: float | None
    agent: Program
    updater: Program
    built: str
    health: dict[str, Any]
    transaction: Transaction | None
    os: str
    arch: str
    python: str


class Certificate(BaseModel):
    serial: str
    issued: float
    not_after: float
    revoked_at: float | None


class ModuleState(BaseModel):
    state: str
    digest: str


class NodeDetail(Node):
    """`address` is where its last channel came from, `wake_port` the TCP port that wakes it (0: none).
    `modules` are its services, with their states and module digests, as its last health told."""

    address: str
    wake_port: int
    modules: dict[str, ModuleState]
    facts: dict[str, Any]
    wanted: dict[str, Wanted]
    certificates: list[Certificate]
    revoked_why: str


class Nodes(BaseModel):
    """`next` is what to give as `after` for the next page, absent on the last one."""

    nodes: list[Node]
    next: str | None


class HistoryEntry(BaseModel):
    """`generation` is that of the wish or order that it is about (0: none). `slot` and `mode` are those of a system
    image: where it goes, and how it is activated."""

    n: int
    source: Literal["node", "server"]
    id: str
    tx: str
    line: str
    phase: str
    version: str
    digest: str
    from_version: str
    reason_code: str
    reason_text: str
    wall: float
    boot_id: str
    stored_at: float
    hash: str
    generation: int
    slot: str
    mode: str


class History(BaseModel):
    """Newest first. `whole`: no entry was altered or is missing; `fault` says which one otherwise.

    A node's newest 5,000 entries are kept. `removed`: so many older ones, numbers 1 to `removed`, are gone;
    what is kept is checked from the hash of the last one of them.
    """

    node: str
    entries: list[HistoryEntry]
    whole: bool
    fault: str
    removed: int


class MoveBody(Body):
    group: GroupName


class RevokeBody(Body):
    why: Label = ""


class Group(BaseModel):
    name: str
    nodes: int


class Groups(BaseModel):
    groups: list[Group]


class GroupBody(Body):
    name: GroupName


class TokenBody(Body):
    """`lifetime_s`: how long the token may be used, in seconds."""

    group: GroupName = "default"
    uses: Annotated[int, Field(ge=1, le=1_000_000), Whole] = 1
    lifetime_s: Annotated[float, Field(ge=1, le=315_360_000)] = 86400.0
    label: Label = ""


class Token(BaseModel):
    id: str
    group: str
    uses: int
    uses_left: int
    expires: float
    created: float
    label: str


class NewToken(Token):
    """`token` is shown this once. `group_made`: the group was not there, and is now."""

    token: str
    group_made: bool


class Tokens(BaseModel):
    tokens: list[Token]


class ApiTokenBody(Body):
    role: Literal["viewer", "operator", "admin"]
    label: Label = ""


class ApiToken(BaseModel):
    id: str
    role: str
    created: float
    label: str


class NewApiToken(ApiToken):
    token: str


class ApiTokens(BaseModel):
    tokens: list[ApiToken]


class WishBody(Body):
    """`subject` is the name of the group or the id of the node. A line is `agent`, `updater` or
    `module/<name>`; `version` is the node program's, or the module's. `via`: `pull` lets the nodes fetch it,
    `native` sends it through their channels, `recovery` has it fetched and installed by a recovery core; modules
    are always fetched."""

    scope: Scope
    subject: Annotated[str, StringConstraints(pattern=names.GROUP_PATTERN)]
    lines: Annotated[list[Line], Field(min_length=1, max_length=32)]
    version: Version
    via: Via = "pull"


class Wish(BaseModel):
    scope: Scope
    subject: str
    line: str
    version: str
    target: str
    digest: str
    generation: int
    made: float
    made_by: str
    via: Via


class Wishes(BaseModel):
    wishes: list[Wish]


class Release(BaseModel):
    version: str
    target: str
    digest: str
    length: int
    sha256: str
    custom: dict[str, Any]


class Releases(BaseModel):
    """`cores` are the recovery cores, newest version first; `bundles` the system bundles, by name, the newest
    version of each first. The digest of a bundle is that of its manifest."""

    releases: list[Release]
    cores: list[Release]
    bundles: list[Release]


class RecoverBody(Body):
    """`version` is a published release's; else it is what is wanted, else what the node last ran, else the
    newest."""

    version: Version | None = None
    lines: Annotated[list[Literal["agent", "updater"]], Field(min_length=1, max_length=2)] = [
        "agent",
        "updater",
    ]


class Transfer(BaseModel):
    """What is being sent to a node, or was last; state `none` when nothing was.

    `blocks` of `of_blocks` of a parcel, `bytes` of `length`, are on the node; `rate` is in bytes a second,
    `percent` 0 to 100, or -1 when it is not told. `phase`, `percent` and `text` are the recovery core's own
    words once it runs; `core` is its version ('' for a transfer without one). `ended` is absent while
    something is still to come.
    """

    node: str
    id: str
    line: str
    via: str
    cause: str
    version: str
    digest: str
    state: str
    block: int
    window: int
    blocks: int
    of_blocks: int
    bytes: int
    length: int
    rate: float
    phase: str
    percent: float
    core: str
    code: str
    text: str
    began: float | None
    changed: float | None
    ended: float | None


class Module(BaseModel):
    """`runs`: python, native or wasm; `mode`: oneshot or service."""

    name: str
    version: str
    target: str
    digest: str
    runs: str
    mode: str
    length: int
    sha256: str
    custom: dict[str, Any]


class Modules(BaseModel):
    modules: list[Module]


class Blob(BaseModel):
    sha256: str
    length: int


class Published(BaseModel):
    """The versions that are served now."""

    root: int
    targets: int
    snapshot: int
    timestamp: int


class Role(BaseModel):
    role: str
    version: int
    expires: int
    expired: bool
    threshold: int
    keys: int


class Trust(BaseModel):
    roles: list[Role]


class Health(BaseModel):
    ok: bool
    version: str


class Ready(Health):
    connected: int


class Deleted(BaseModel):
    deleted: bool = True


class Poked(BaseModel):
    address: str
    port: int
