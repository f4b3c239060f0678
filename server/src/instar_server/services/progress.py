"""What is being sent to each node, or was last: for `GET /nodes/{id}/transfer` and those who watch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from instar_server.bus.api import FLEET, Bus, transfer_topic
from instar_server.services.ports import Now

MOST_ENDED = 5000  # nodes whose last transfer is kept for display; what was longest unchanged goes first
TELL_EVERY_S = 0.25  # least time between two words about blocks


@dataclass(slots=True)
class View:
    """One node's transfer or recovery. Sizes in bytes, `rate` in bytes a second, `percent` 0 to 100, or -1.

    `state`: queued, offered, sending, checking, received, not-needed, declined, failed, cut, dropped; of a
    recovery also installing and done. `ended` is None while something is still to come.
    `blocks` of `of_blocks` are on the node. `core` is the version of the recovery core ('' for none).
    """

    node: str
    id: str = ""
    line: str = ""
    via: str = ""  # native | recovery
    cause: str = ""  # wish | force | trouble | operator | beacon
    version: str = ""
    digest: str = ""
    state: str = "none"
    block: int = 0
    window: int = 0
    blocks: int = 0
    of_blocks: int = 0
    bytes: int = 0
    length: int = 0
    rate: float = 0.0
    phase: str = ""
    percent: float = -1.0
    core: str = ""
    code: str = ""
    text: str = ""
    began: float | None = None
    changed: float | None = None
    ended: float | None = None


class Board:
    def __init__(self, bus: Bus, now: Now) -> None:
        self._bus, self._now = bus, now
        self._views: dict[str, View] = {}
        self._told: dict[str, float] = {}

    def view(self, node: str) -> View:
        """What is known; one with the state `none` when nothing was ever sent."""
        return self._views.get(node) or View(node)

    def begin(self, node: str, **fields: Any) -> View:
        """Something new for this node, in the place of what was there."""
        now = self._now()
        self._views.pop(node, None)
        view = self._views[node] = View(node, **fields, began=now, changed=now)
        self._forget()
        self._tell(view, True)
        return view

    def note(self, view: View, ended: bool | None = None, **fields: Any) -> None:
        """Change what is shown, unless something newer is shown by now. Watchers are told at once when the state
        or the phase changes, else now and then.

        `ended`: whether it is over; None leaves that as it is.
        """
        if self._views.get(view.node) is not view:
            return
        before = (view.state, view.phase, view.code, view.ended is None)
        for name, value in fields.items():
            setattr(view, name, value)
        view.changed = self._now()
        if ended is not None:
            view.ended = view.changed if ended else None
        self._tell(view, before != (view.state, view.phase, view.code, view.ended is None))

    def _tell(self, view: View, at_once: bool) -> None:
        node, now = view.node, self._now()
        if not at_once and 0 <= now - self._told.get(node, 0.0) < TELL_EVERY_S:
            return
        self._told[node] = now
        self._bus.publish(transfer_topic(node), {"kind": "transfer", **asdict(view)})
        if at_once:
            told = {name: getattr(view, name) for name in ("node", "line", "via", "version", "state", "code")}
            self._bus.publish(FLEET, {"kind": "transfer", **told})

    def _forget(self) -> None:
        if len(self._views) <= MOST_ENDED:
            return
        for node, view in list(self._views.items()):
            if view.ended is not None:
                del self._views[node]
                self._told.pop(node, None)
                return
