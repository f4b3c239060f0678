"""Nodes, their histories and groups."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query

from instar_server.services.fleet import NodeView
from instar_server.services.poke import poke
from instar_server.web import models as m
from instar_server.web.callers import Operator, Services, Viewer, errors

router = APIRouter(tags=["nodes"])

NodePath = Annotated[m.NodeId, Path(description="The node's id.")]


def _fields(view: NodeView) -> dict[str, Any]:
    columns = view.columns
    transaction = None
    if columns["tx"]:
        transaction = m.Transaction(
            tx=columns["tx"],
            line=columns["tx_line"],
            phase=columns["tx_phase"],
            version=columns["tx_version"],
            reason_code=columns["tx_reason_code"],
            reason_text=columns["tx_reason_text"],
            at=columns["tx_at"],
        )
    return {
        "id": view.row.id,
        "group": view.row.group,
        "state": view.state,
        "enrolled": view.row.enrolled,
        "connected_since": view.connected_since,
        "last_seen": view.last_seen,
        "agent": m.Program(version=view.agent[0], digest=view.agent[1]),
        "updater": m.Program(version=view.updater[0], digest=view.updater[1]),
        "built": columns["agent_built"],
        "health": view.health,
        "transaction": transaction,
        "os": columns["os"],
        "arch": columns["arch"],
        "python": columns["python"],
    }


def _modules(view: NodeView) -> dict[str, m.ModuleState]:
    states, digests = view.health.get("modules", {}), view.health.get("digests", {})
    return {
        name: m.ModuleState(state=states.get(name, ""), digest=digests.get(name, ""))
        for name in sorted({*states, *digests})
    }


@router.get("/nodes", responses=errors(401, 422))
async def list_nodes(
    services: Services,
    caller: Viewer,
    group: Annotated[m.GroupName | None, Query(description="Only nodes of this group.")] = None,
    after: Annotated[m.NodeId | None, Query(description="Only nodes after this id.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> m.Nodes:
    """Nodes by id, with what they run and how they are."""
    views = await services.fleet.nodes(group, after or "", limit)
    last = views[-1].row.id if len(views) == limit else None
    return m.Nodes(nodes=[m.Node(**_fields(view)) for view in views], next=last)


@router.get("/nodes/{node}", responses=errors(401, 404, 422))
async def show_node(services: Services, caller: Viewer, node: NodePath) -> m.NodeDetail:
    """One node: its state, what it is wanted to run and its certificates."""
    view = await services.fleet.node(node)
    wanted = {
        line: m.Wanted.model_validate(
            {
                "version": w.version,
                "digest": w.digest,
                "generation": w.generation,
                "scope": w.scope,
                "via": w.via,
            }
        )
        for line, w in (await services.wishes.of_node(node)).items()
    }
    certificates = [
        m.Certificate(serial=c.serial, issued=c.issued, not_after=c.not_after, revoked_at=c.revoked_at)
        for c in await services.fleet.certificates(node)
    ]
    return m.NodeDetail(
        **_fields(view),
        facts=view.facts,
        wanted=wanted,
        certificates=certificates,
        revoked_why=view.row.revoked_why,
        address=view.columns["address"],
        wake_port=view.columns["wake_port"],
        modules=_modules(view),
    )


@router.get("/nodes/{node}/history", responses=errors(401, 404, 422))
async def node_history(
    services: Services, caller: Viewer, node: NodePath, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> m.History:
    """A node's time line, newest first, and whether it is whole."""
    entries = await services.history.latest(node, limit)
    whole = await services.history.check(node)
    shown = [m.HistoryEntry.model_validate(entry) for entry in entries]
    return m.History(node=node, entries=shown, whole=whole.ok, fault=whole.fault, removed=whole.removed)


@router.put("/nodes/{node}/group", responses=errors(400, 401, 403, 404, 422))
async def move_node(services: Services, caller: Operator, node: NodePath, body: m.MoveBody) -> m.Node:
    """Put a node into another group, which must be there: `POST /groups` makes one."""
    await services.wishes.move(node, body.group)
    return m.Node(**_fields(await services.fleet.node(node)))


@router.post("/nodes/{node}/poke", responses=errors(400, 401, 403, 404, 409, 422, 503))
async def poke_node(services: Services, caller: Operator, node: NodePath) -> m.Poked:
    """Connect to the node's wake-up port from here, so that it phones home now."""
    view = await services.fleet.node(node)
    address, port = view.columns["address"], view.columns["wake_port"]
    await poke(node, address, port)
    return m.Poked(address=address, port=port)


@router.post("/nodes/{node}/revoke", responses=errors(400, 401, 403, 404, 409, 422))
async def revoke_node(services: Services, caller: Operator, node: NodePath, body: m.RevokeBody) -> m.Node:
    """Never serve this node again; its connection ends."""
    await services.standing.revoke_node(node, body.why, caller.id)
    return m.Node(**_fields(await services.fleet.node(node)))


@router.post("/certificates/{serial}/revoke", responses=errors(400, 401, 403, 404, 409, 422))
async def revoke_certificate(services: Services, caller: Operator, serial: m.Serial) -> m.Deleted:
    """Never accept this certificate again; the node's other ones stay good."""
    await services.standing.revoke_certificate(serial, caller.id)
    return m.Deleted()


@router.get("/groups", responses=errors(401))
async def list_groups(services: Services, caller: Viewer) -> m.Groups:
    """Groups with the number of their nodes."""
    return m.Groups(groups=[m.Group(name=name, nodes=count) for name, count in await services.fleet.groups()])


@router.post("/groups", responses=errors(400, 401, 403, 422))
async def add_group(services: Services, caller: Operator, body: m.GroupBody) -> m.Group:
    """Make a group; one that is there already is no error."""
    await services.fleet.add_group(body.name, services.now())
    counts = dict(await services.fleet.groups())
    return m.Group(name=body.name, nodes=counts[body.name])
