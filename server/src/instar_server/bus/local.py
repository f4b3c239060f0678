"""The bus inside one process: a call of each subscriber's handler."""

from __future__ import annotations

import logging
from typing import Any

from instar_server.bus.api import Handler, Message

log = logging.getLogger(__name__)


class _Subscription:
    __slots__ = ("_bus", "_handler", "_topic")

    def __init__(self, bus: LocalBus, topic: str, handler: Handler) -> None:
        self._bus, self._topic, self._handler = bus, topic, handler

    def close(self) -> None:
        self._bus._drop(self._topic, self._handler)


class LocalBus:
    """Handlers are called in the order of subscription, from the event loop's thread."""

    def __init__(self) -> None:
        self._handlers: dict[str, list[Handler]] = {}

    def publish(self, topic: str, body: dict[str, Any]) -> None:
        message = Message(topic, body)
        for handler in tuple(self._handlers.get(topic, ())):
            try:
                handler(message)
            except Exception:  # one bad subscriber must not keep the others from hearing
                log.exception("a handler of %s failed", topic)

    def subscribe(self, topic: str, handler: Handler) -> _Subscription:
        self._handlers.setdefault(topic, []).append(handler)
        return _Subscription(self, topic, handler)

    def _drop(self, topic: str, handler: Handler) -> None:
        handlers = self._handlers.get(topic, [])
        if handler in handlers:
            handlers.remove(handler)
        if not handlers:
            self._handlers.pop(topic, None)
