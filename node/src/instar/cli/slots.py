"""The two slots of the operating system, as `instar status` shows them. Looks only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from instar.core.errors import InstarError
from instar.host.config import has_settings, read_config
from instar.host.layout import Layout


def slots(layout: Layout) -> dict[str, Any] | None:
    """None where the settings name no slots. What cannot be found out is said in `fault`."""
    if not has_settings(layout):
        return None
    try:
        settings = read_config(layout).os
    except InstarError:
        return None
    if not settings.disk:
        return None
    from instar.targets.slots.records import read_records
    from instar.updater.slots import open_platform

    records = read_records(layout.slots)
    found: dict[str, Any] = {
        "running": "", "order": [], "once": "", "tries": {}, "drift": [], "fault": "",
        "slots": {name: record._asdict() for name, record in records.items()},
    }  # fmt: skip
    try:
        platform = open_platform(settings, layout, lambda: layout.launcher)
        found["running"] = platform.running()
        state = platform.boot.state()
    except InstarError as error:
        return {**found, "fault": error.text}
    return {
        **found, "order": list(state.order), "once": state.once, "tries": state.tries, "drift": list(state.drift),
    }  # fmt: skip


def slot_lines(shown: dict[str, Any]) -> Iterator[str]:
    for name, record in shown["slots"].items():
        words = [record["state"]]
        if name == shown["running"]:
            words.insert(0, "runs")
        if shown["order"][:1] == [name]:
            words.append("first choice")
        if name == shown["once"]:
            words.append("tried at the next boot")
        if name in shown["tries"]:
            words.append(f"{shown['tries'][name]} tries left")
        why = f": {record['why']}" if record["why"] else ""
        yield f"slot {name}   {record['version'] or 'nothing known':28} {', '.join(words)}{why}"
    for text in shown["drift"]:
        yield f"{'':8} not as it was left: {text}"
    if shown["fault"]:
        yield f"slots    cannot be used: {shown['fault']}"
    elif not shown["running"]:
        yield "slots    the mounted root lies on neither"
