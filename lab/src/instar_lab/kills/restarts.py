"""The courses that restart the agent or a module while they are killed."""

from __future__ import annotations

import time
from typing import Any

from instar.core.errors import InstarError
from instar_lab.kills.course import Course
from instar_lab.kills.modules import MEMORY
from instar_lab.kills.ward import FINAL, Ward

WITHIN_S = 60.0  # of a restart


class Restart(Course):
    """Ordered by the server, or on the node."""

    modules: tuple[str, ...] = ()
    agent = local = False

    def __init__(self, ward: Ward) -> None:
        super().__init__(ward)
        self._order = self._id = ""
        self._known: set[str] = set()
        self._pids: dict[str, int] = {}
        self._begun = 0.0
        self._end: dict[str, Any] = {}

    def prepare(self) -> None:
        self.runs("")

    def begin(self) -> None:
        self._pids, self._known = dict(self.ward.said("agent", "health")["pids"]), self._commands()
        self._begun = time.monotonic()
        wanted = {"modules": list(self.modules), "agent": self.agent, "within_s": WITHIN_S}
        if not self.local:
            self._order = self.ward.order("/restarts", **wanted)
            return
        try:
            self._id = self.ward.said("agent", "restart", **wanted)["id"]
        except InstarError:
            return  # killed before it could answer: whether it was asked is seen on the disk

    def ended(self) -> bool:
        return bool(self._status())

    def fault(self) -> str:
        status = self._status()
        if not status:
            return f"the command {self._id} has not ended"
        if self._end and status != self._end:
            return f"it had ended as {self._end}, now it is {status}"
        self._end = status
        if status["how"] != "success":
            return f"it ended as {status}"
        said = self.ward.said("agent", "health")
        same = [name for name, pid in self._pids.items() if said["pids"].get(name) == pid]
        if self.agent and time.monotonic() - said["uptime_s"] < self._begun:
            same.append(
                "agent"
            )  # its process may be the same: it can become the launcher, and so the next agent
        return f"it ended well, and {same} was not restarted" if same else ""

    def last(self) -> str:
        told = self.ward.told(self._id)
        if told != 1:
            return f"the server's history has {told} ends of {self._id}"
        return super().last()

    def outcome(self) -> str:
        status = self._status()
        return f"{status.get('how', 'no end')} {status.get('code', '')}".strip()

    def _status(self) -> dict[str, Any]:
        """How it ended, {} while it has not: by the server's row, or its history and the node's own word."""
        if self._order:
            row = self.ward.row(self._order)
            self._id = row["id"]
            how = "success" if row["ok"] else "failure"
            final = {"how": how, "code": row["code"], "state": row["state"], "ended": row["ended_at"]}
            return final if row["state"] in FINAL else {}
        if not self._id:
            new = self._commands() - self._known
            self._id = next(iter(new), "")
        if not self._id or not self.ward.told(self._id):
            return {}
        said = self.ward.said("agent", "command", id=self._id)
        how = str(said["status"])
        final = {"how": how, "code": said["code"], "ended": said["ended"]}
        return final if how in ("success", "failure", "timeout") else {}

    def _commands(self) -> set[str]:
        """The ids of all commands that the node has on its disk."""
        return {
            path.name.split(".", 1)[1].removesuffix(".json")
            for path in self.ward.layout.commands.rglob("*.json")
        }


class RestartModule(Restart):
    name, about = "restart-module", "a restart of a module, ordered by the server"
    modules = (MEMORY,)


class RestartAgent(Restart):
    name, about = "restart-agent", "a restart of the agent and its modules, ordered by the server"
    agent = True


class LocalModule(Restart):
    name, about = "local-restart-module", "a restart of a module, ordered on the node"
    modules, local = (MEMORY,), True


class LocalAgent(Restart):
    name, about = "local-restart-agent", "a restart of the agent and its modules, ordered on the node"
    agent = local = True
