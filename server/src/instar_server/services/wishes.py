"""What is wanted to run where."""

from __future__ import annotations

from instar.core.errors import InputError
from instar_server.bus.api import FLEET, WISHES, Bus
from instar_server.domain import names
from instar_server.domain.errors import NotFound
from instar_server.domain.wanted import GROUP, NATIVE, NODE, PULL, RECOVERY, VIAS, Wish, effective
from instar_server.services.history import History, server_entry
from instar_server.services.ports import Modules, Now, Releases
from instar_server.storage import work
from instar_server.storage.connection import Connection
from instar_server.storage.database import Database
from instar_server.storage.events import Events
from instar_server.storage.nodes import Groups, Nodes


class Wishes:
    def __init__(self, database: Database, bus: Bus, releases: Releases, modules: Modules, now: Now) -> None:
        self._database, self._bus, self._now = database, bus, now
        self._releases, self._modules = releases, modules

    async def put(
        self, scope: str, subject: str, lines: list[str], version: str, by: str, via: str = PULL
    ) -> list[Wish]:
        """Want a published release for lines of a group or node: the node program for `agent` and `updater`,
        the module for `module/<name>`. Asking for the same again is a new wish: it has a new generation, so a
        node that gave up on the release tries it again. `via` is how its bytes come; modules are fetched.

        Raises InputError `unknown-release`, `unknown-module`, `not-a-service`, `bad-via`, NotFound
        `unknown-node`, `unknown-group`.
        """
        names.one_of("via", via, VIAS)
        if via != PULL and any(names.module_of(line) is not None for line in lines):
            raise InputError("bad-via", f"cannot want a module by way of {via}: nodes fetch modules")
        released = {line: self._resolve(names.line(line), version) for line in dict.fromkeys(lines)}
        now = self._now()
        async with self._database.write() as connection:
            await self._check_subject(connection, scope, subject)
            wishes = work.Wishes(connection)
            made = []
            for line, (target, digest) in released.items():
                generation = await wishes.next_generation(now)
                wish = Wish(scope, subject, line, version, target, digest, generation, now, by, via)
                await wishes.put(wish)
                made.append(wish)
            if scope == NODE:
                entries = [_entry(wish, now) for wish in made]
                await Events(connection).append(subject, History.SERVER, entries, now)
        self._tell(scope, subject, version)
        return made

    def _resolve(self, line: str, version: str) -> tuple[str, str]:
        """Target path and digest of what is wanted."""
        name = names.module_of(line)
        if name is None:
            release = self._releases.by_version(version)
            if release is None:
                text = f"cannot want {version[:64]}: it is not a published node release"
                raise InputError("unknown-release", text)
            return release.target, release.digest
        module = self._modules.find(name, version)
        if module is None:
            text = f"cannot want {name} {version[:64]}: it is not a published module"
            raise InputError("unknown-module", text)
        if module.mode != "service":
            text = f"cannot want {name}: it is run by jobs, only service modules stay on a node"
            raise InputError("not-a-service", text)
        return module.target, module.digest

    async def remove(self, scope: str, subject: str, lines: list[str]) -> None:
        """Take wishes back; nodes stay on what they run. Raises NotFound `no-wish` when there was none."""
        now = self._now()
        async with self._database.write() as connection:
            wishes = work.Wishes(connection)
            gone = [await wishes.remove(scope, subject, line) for line in dict.fromkeys(lines)]
            if not any(gone):
                raise NotFound(
                    "no-wish", f"cannot take back: there is no such wish for {scope} {subject[:63]}"
                )
            if scope == NODE:
                # What the node is told next comes from its group, and must not have an older generation.
                floor = await wishes.next_generation(now)
                await Nodes(connection).set(subject, generation_floor=floor)
                text = f"{', '.join(dict.fromkeys(lines))} no longer wanted for this node"
                entry = server_entry(f"unwanted:{floor}", "unwanted", now, "unwanted", text)
                await Events(connection).append(subject, History.SERVER, [entry], now)
        self._tell(scope, subject, "")

    async def all(self) -> list[Wish]:
        async with self._database.read() as connection:
            return await work.Wishes(connection).all()

    async def of_node(self, node: str) -> dict[str, Wish]:
        """The wish that counts for each line of a node. Raises NotFound."""
        async with self._database.read() as connection:
            row = await Nodes(connection).get(node)
            if row is None:
                raise NotFound("unknown-node", f"cannot say what {node} should run: there is no such node")
            near = await work.Wishes(connection).near(node, row.group)
        return effective(near, node, row.group, row.generation_floor)

    async def move(self, node: str, group: str) -> None:
        """Put a node into a group that is there. Raises NotFound `unknown-node`, `unknown-group`."""
        now = self._now()
        async with self._database.write() as connection:
            row = await Nodes(connection).get(node)
            if row is None:
                raise NotFound("unknown-node", f"cannot move {node}: there is no such node")
            if not await Groups(connection).exists(group):
                raise _no_group(f"move {node} to {group[:63]}", group)
            floor = await work.Wishes(connection).next_generation(now)
            await Nodes(connection).set(node, group_name=group, generation_floor=floor)
            entry = server_entry(
                f"moved:{floor}", "moved", now, "moved", f"moved from {row.group} to {group}"
            )
            await Events(connection).append(node, History.SERVER, [entry], now)
        self._tell(NODE, node, "")

    async def _check_subject(self, connection: Connection, scope: str, subject: str) -> None:
        if scope == GROUP and not await Groups(connection).exists(subject):
            raise _no_group(f"want for group {subject[:63]}", subject)
        if scope == NODE and await Nodes(connection).get(subject) is None:
            raise NotFound("unknown-node", f"cannot want for {subject[:63]}: there is no such node")

    def _tell(self, scope: str, subject: str, version: str) -> None:
        self._bus.publish(WISHES, {"scope": scope, "subject": subject})
        self._bus.publish(FLEET, {"kind": "wish", "scope": scope, "subject": subject, "version": version})


def _no_group(what: str, group: str) -> NotFound:
    way_out = f"make it first: instarctl groups add {group[:63]}"
    return NotFound("unknown-group", f"cannot {what}: there is no such group; {way_out}")


def _entry(wish: Wish, now: float) -> dict[str, object]:
    way = {NATIVE: ", through its channel", RECOVERY: ", by a recovery core"}.get(wish.via, "")
    text = f"{wish.line} {wish.version} wanted for this node by {wish.made_by}{way}"
    return server_entry(
        f"wanted:{wish.generation}", "wanted", now, "wanted", text, wish.line, wish.version, wish.digest
    )
