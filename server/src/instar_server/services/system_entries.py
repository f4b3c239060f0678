"""Entries of a node's history about what was ordered of its operating system."""

from __future__ import annotations

from typing import Any

from instar_server.domain import systems
from instar_server.domain.systems import Update
from instar_server.services.history import server_entry


def update_entry(update: Update, what: str, by: str, now: float) -> dict[str, Any]:
    how = "without activation" if update.mode == systems.NONE else f"by {update.mode}"
    source = f", from {update.source}" if update.source else ""
    source += ", cold boot or not" if update.override else ""
    text = f"system {update.name} {update.version} {how}{source}: {what} by {by} ({update.id})"
    code = f"system-{what}"
    entry = server_entry(
        f"{code}:{update.generation}", code, now, code, text, systems.LINE, update.version, update.digest
    )
    return entry | {"generation": update.generation, "mode": update.mode, "slot": update.slot}


def cold_entry(what: str, generation: int, by: str, now: float) -> dict[str, Any]:
    code = f"cold-boot-{what}"
    entry = server_entry(f"{code}:{generation}", code, now, code, f"cold boot {what} by {by}", systems.LINE)
    return entry | {"generation": generation}
