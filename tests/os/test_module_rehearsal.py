"""A service module's rehearsal under systemd: the updater's unit may do little, and a module as much as under the agent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instar.host.line import Line
from tests.os.conftest import OLD
from tests.os.node import UPDATER, OsNode

pytestmark = pytest.mark.os

TOML = """\
name = "demo.{name}"
version = "{version}"
runs = "python"
mode = "service"
stateful = true

[entry]
any = "main.py"

[touches]
user = "{user}"
"""
# Does at its start what the updater's unit may not: sees its user, asks the kernel over netlink, keeps its state.
MAIN = """\
import os, pwd, socket

def start(context):
    context.save({{"user": pwd.getpwuid(os.geteuid()).pw_name}})
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()
    {more}

def request(args, context):
    return context.load()
"""


def publish(node: OsNode, folder: Path, name: str, version: str, user: str = "", more: str = "pass") -> None:
    source = folder / f"{name}-{version}"
    source.mkdir()
    (source / "module.toml").write_text(TOML.format(name=name, version=version, user=user))
    (source / "main.py").write_text(MAIN.format(more=more))
    node.server.publish_module(source)


def want(node: OsNode, name: str, version: str) -> None:
    node.server.want(version, [f"module/demo.{name}"], node.group)


@pytest.mark.parametrize("user", ["", "nobody"])
def test_a_module_passes_its_rehearsal_as_it_would_run(node: OsNode, tmp_path: Path, user: str) -> None:
    name = f"as{user}"
    publish(node, tmp_path, name, "1.0.0", user)
    publish(node, tmp_path, name, "1.1.0", user, "raise ValueError('not today')")
    publish(node, tmp_path, name, "1.2.0", user, "import time; time.sleep(600)")
    node.set_up(OLD)
    want(node, name, "1.0.0")
    (first,) = node.settled(1)
    assert (first["state"], first["reason"]) == ("confirmed", None), node.words()
    state = node.layout.module(f"demo.{name}").data / "state.json"
    assert json.loads(state.read_text()) == {"user": user or "root"}

    want(node, name, "1.1.0")
    second = node.settled(2)[-1]
    assert (second["state"], second["reason"]["code"]) == ("reverted", "module-failed"), node.words()
    assert "not today" in second["reason"]["text"] or "ValueError" in second["reason"]["text"]
    assert Line(node.layout.module(f"demo.{name}")).current().startswith("1.0.0-")
    assert list(node.layout.staging.iterdir()) == []
    assert "rehearsal" not in node.container.do("systemctl", "list-units", "--all", "--no-legend")
    assert node.active(UPDATER) in ("active", "inactive")
