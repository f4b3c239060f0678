"""What a bus can do. In process today; the same interface fits NATS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

AGENTS = "agents"  # orders to whoever holds a node's channel: {"do": "look" | "revoke" | "send", "node", …}
FLEET = "fleet"  # what changed, for those who watch: {"kind", "node", …}
WISHES = "wishes"  # the wishes changed


@dataclass(frozen=True, slots=True)
class Message:
    topic: str
    body: dict[str, Any]


Handler = Callable[[Message], None]


class Subscription(Protocol):
    def close(self) -> None:
        """No call of the handler after this. Closing twice is fine."""


class Bus(Protocol):
    def publish(self, topic: str, body: dict[str, Any]) -> None:
        """Tell every subscriber of `topic`, at most once, without waiting for them."""

    def subscribe(self, topic: str, handler: Handler) -> Subscription:
        """Call `handler` with each message of `topic`. It must not block and should not raise."""


def verdict_topic(node: str, tx: str) -> str:
    """Where a verdict about a node's transaction is announced."""
    return f"verdict.{node}.{tx}"


def order_topic(order: str) -> str:
    """Where the changes of an order's rows are announced, and what they say while they run."""
    return f"order.{order}"


def transfer_topic(node: str) -> str:
    """Where it is announced how far the transfer to a node is."""
    return f"transfer.{node}"


def system_topic(node: str) -> str:
    """Where it is announced that something about a node's operating system has changed."""
    return f"system.{node}"


def health_topic(node: str) -> str:
    """Where a node's health is announced."""
    return f"health.{node}"
