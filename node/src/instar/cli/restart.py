"""Commands about service modules and restarts, over the running agent's local API: restart, modules."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from instar.core.commands import FINAL, Status
from instar.core.errors import InputError, MachineError, ReleaseError
from instar.host.layout import Layout
from instar.host.records import read_node
from instar.host.sockets import ask

ASK_S = 5.0
POLL_S = 0.1
CALLERS_FAULT = ("bad-command", "bad-module-name", "unknown-module", "unknown-command-id")


def restart(args: argparse.Namespace) -> dict[str, Any]:
    """Ask for a restart and wait for its end. The agent may be away meanwhile: it is asked again.

    Raises what the command's end says; MachineError `still-under-way` when none came within --wait.
    """
    layout = Layout(args.state)
    read_node(layout)
    end, modules = time.monotonic() + args.wait, sorted(set(args.module))
    request = {"do": "restart", "modules": modules, "agent": not modules, "within_s": args.within}
    command_id = ask(layout.socket("agent"), request, ASK_S)["id"]
    said = ""
    while time.monotonic() < end:
        status = _status(layout, command_id)
        if status and status["status"] != said:
            said = status["status"]
            if not args.json:
                print(f"{command_id} {said}", flush=True)
            if Status(said) in FINAL:
                return _ended(status)
        time.sleep(POLL_S)
    text = f"cannot tell how {command_id} ended: it is {said or 'not known'} after {args.wait:g} s"
    raise MachineError("still-under-way", text)


def _status(layout: Layout, command_id: str) -> dict[str, Any]:
    """Empty while the agent is away."""
    try:
        return ask(layout.socket("agent"), {"do": "command", "id": command_id}, ASK_S)
    except MachineError:
        return {}


def _ended(status: dict[str, Any]) -> dict[str, Any]:
    code, text = str(status["code"]), str(status["text"])
    if status["status"] == Status.SUCCESS.value:
        return status
    if code in CALLERS_FAULT:
        raise InputError(code, text)
    raise ReleaseError(code, text) if code == "module-failed" else MachineError(code, text)


def restart_lines(answer: dict[str, Any]) -> Iterator[str]:
    for name, how in sorted(answer["modules"].items()):
        yield f"{name:24} {how}"
    if answer["text"]:
        yield str(answer["text"])


def modules(args: argparse.Namespace) -> dict[str, Any]:
    layout = Layout(args.state)
    read_node(layout)
    return {"modules": ask(layout.socket("agent"), {"do": "modules"}, ASK_S)["modules"]}


def modules_lines(answer: dict[str, Any]) -> Iterator[str]:
    if not answer["modules"]:
        yield "no service module runs here"
        return
    yield f"{'MODULE':24} {'VERSION':12} {'STATE':13} {'PID':>7} {'SINCE':16} {'FALLS':>5}"
    for row in answer["modules"]:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["since"]))
        pid = row["pid"] or "-"
        yield f"{row['name']:24} {row['version']:12} {row['life']:13} {pid:>7} {since} {row['restarts']:>5}"
        if row["error"]:
            yield f"  {row['error']}"
