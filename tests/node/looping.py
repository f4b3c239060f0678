"""The updater's loop on a node of world.py, in this process, with a server that wants what a test says."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace

from instar.core.errors import ServerUnreachable
from instar.core.journal import Begin
from instar.core.settings import UpdaterSettings
from instar.core.wish import Wanted, Wish
from instar.host.incoming import Incoming
from instar.updater.loop import Loop
from instar.updater.orders import Orders, Pushed
from instar.updater.targets import Targets
from tests.node.test_stage_parcel import bring
from tests.node.world import Built, Node, Quiet

AWAY = ServerUnreachable("server-unreachable", "no route")


class Client:
    def __init__(self, node: Node) -> None:
        self.wishes: list[Wish] = [Wish("agent", node.new.release, "node/new.tar.gz", 5)]
        self.troubles: list[str] = []
        self.away = False

    def wanted(self, trouble: str = "") -> Wanted:
        if self.away:
            raise AWAY
        self.troubles.append(trouble)
        return Wanted(tuple(self.wishes), 300.0)


class World:
    def __init__(self, node: Node) -> None:
        self.node, self.client, self.follower = node, Client(node), Quiet()
        self.again()
        node.boot()

    def again(self) -> None:
        """The updater was started anew."""
        self.orders = Orders(threading.Lock(), threading.Event(), self.node.layout.orders)
        self.orders.recall({begin.tx for begin in self.begun})
        kit = replace(self.node.kit(), brought=self.orders.brought)
        self.loop = Loop(
            self.node.layout, self.node.clock, Targets(kit), self.client, self.follower,  # type: ignore[arg-type]
            UpdaterSettings(), self.orders,
        )  # fmt: skip

    def wish(self, **changes: object) -> None:
        self.client.wishes = [replace(self.client.wishes[0], **changes)]  # type: ignore[arg-type]

    def push(self, built: Built | None = None, tx: str = "tx-push") -> None:
        release = (built or self.node.new).release
        bring(self.node, built)
        self.orders.order_push(Pushed(tx, "agent", release.version, release.digest, "node/new.tar.gz"))

    @property
    def current(self) -> str:
        return self.node.line.current()

    @property
    def begun(self) -> list[Begin]:
        return [journal.progress.begin for journal in self.node.journals.read_all()]

    def parcels(self) -> int:
        return len(Incoming(self.node.layout.incoming).complete())


def offer(node: Node, built: Built) -> None:
    """The server has `built` from now on."""
    node.new = node.server.offered = built
    node.server.served.data = built.archive
    node.server.sha256 = hashlib.sha256(built.archive).hexdigest()
