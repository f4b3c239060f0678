"""Orders of an operator from end to end: a rollback most of all, and the updater that becomes another release by it.
A real process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from instar.host.files import point_link
from instar.host.identity import Node, write_node
from instar.host.layout import LINES
from instar.host.line import Line
from instar.updater.http import openapi
from instar_lab.program import build, variants
from instar_server.ctl.main import app
from tests.node.updater_host import NODE, PASSING_S, Host, check, hosted, install_release, wait_for

NEWER = "1.1.0"
SETTINGS = "[trial]\nhold_s = 0.2\n"


@pytest.fixture
def updated() -> Iterator[Host]:
    """A node whose lines are at NEWER, with what was there before; its updater is not started."""
    with hosted(SETTINGS) as host:
        for role in LINES:
            line = Line(host.layout.line(role))
            before = line.current()
            install_release(line, build.build(NEWER))
            point_link(line.layout.previous, f"releases/{before}")
        yield host


def order(host: Host, line: str) -> str:
    """The transaction that a rollback is to be."""
    status, body = host.remote("POST", "/v1/rollback", body={"line": line})
    assert (status, body["line"], body["version"]) == (202, line, "1.0.0"), body
    check(openapi.SCHEMAS["RolledBack"], body)
    return str(body["tx"])


def ended(host: Host, tx: str) -> str:
    def state() -> str:
        with contextlib.suppress(OSError):  # it is on its way to another release
            status, shown = host.local("GET", f"/v1/transactions/{tx}")
            return str(shown["state"]) if status == 200 and shown["finished"] else ""
        return ""

    return str(wait_for(state, PASSING_S, host.log))


def test_an_updater_comes_back_with_what_it_was_launched_with(updated: Host) -> None:
    """D8: whoever launched it wants its words in JSON also after an update."""
    updated.start([*updated.words(), "--log", "json"])
    assert updated.process is not None
    pid = updated.process.pid
    assert ended(updated, order(updated, "updater")) == "confirmed"
    health = updated.local("GET", "/v1/health")[1]
    assert (health["version"], health["pid"]) == ("1.0.0", pid)
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    assert words[-3:-1] == ["--log", "json"]


def test_a_way_back_that_fails_says_what_both_releases_said(updated: Host) -> None:
    """D6, also for whoever asks on the node itself."""
    line = Line(updated.layout.line("agent"))
    bad = install_release(line, variants.variant("crashes-once-activated", "1.0.5"))
    for link, release in ((line.layout.previous, bad.name), (line.layout.current, line.names()[-1])):
        point_link(link, f"releases/{release}")
    config = updated.layout.config
    config.write_text(config.read_text().replace(SETTINGS, "[trial]\nhold_s = 3.0\n"))
    updated.start()
    words = [*updated.words()[:4], "rollback", "--state", str(updated.layout.state), "--wait", "240"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300.0, check=False)
    assert (done.returncode, "rollback-reverted" in done.stderr) == (7, True), done.stderr
    assert f"candidate {bad.name} " in done.stderr
    assert f"restored {NEWER}-" in done.stderr


def test_without_slots_there_is_no_system_to_go_back_to(updated: Host) -> None:
    updated.start()
    status, body = updated.local("POST", "/v1/rollback", body={"line": "os"})
    assert (status, body["error"]["code"]) == (412, "no-slots")
    assert str(status) in openapi.document("1")["paths"]["/v1/rollback"]["post"]["responses"]
    status, body = updated.local("POST", "/v1/rollback", body={"line": "module/absent"})
    assert (status, body["error"]["code"]) == (409, "nothing-to-roll-back-to")
    assert body["error"]["message"].endswith("there is no release of it here")


def test_a_line_that_is_none_is_told_by_the_updater(updated: Host) -> None:
    updated.start()
    done = instarctl(updated, "push", str(updated.papers.ca), "--line", "a b&x")
    assert (done.exit_code, "got 'a b&x' [unknown-line]" in done.stderr) == (6, True), done.output


@contextlib.contextmanager
def loop_asks(host: Host) -> Iterator[None]:
    """The updater runs, and its loop waits for a server that takes every call and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PASSING_S)
        server = f"https://127.0.0.1:{listener.getsockname()[1]}"
        write_node(host.layout, Node(NODE, server, "default", time.time()))
        host.start()
        with contextlib.closing(listener.accept()[0]):
            yield


def test_a_rollback_has_its_name_as_soon_as_it_is_ordered(updated: Host) -> None:
    """The loop may be busy for long: with a server that it asks, and that does not answer."""
    with loop_asks(updated):
        tx = order(updated, "updater")
        status, shown = updated.remote("GET", f"/v1/transactions/{tx}")
        assert status == 200
        check(openapi.SCHEMAS["Transaction"], shown)
        assert (shown["line"], shown["cause"], shown["via"]) == ("updater", "rollback", "")
        assert (shown["state"], shown["finished"]) == ("waiting", False)
        assert updated.local("GET", "/v1/health")[1]["transaction"] == tx
        status, body = updated.remote("POST", "/v1/rollback", body={"line": "agent"})
        assert (status, body["error"]["code"]) == (409, "busy")
        assert f"transaction {tx} is under way" in body["error"]["message"]
    assert ended(updated, tx) == "confirmed"


def test_who_ordered_a_rollback_follows_it_while_it_waits(updated: Host) -> None:
    with loop_asks(updated):
        late = instarctl(updated, "rollback", "--line", "updater", "--wait", "1s")
        tx = updated.local("GET", "/v1/health")[1]["transaction"]
    assert (late.exit_code, "still-under-way" in late.stderr) == (5, True), late.output
    assert "updater: waiting" in late.stderr
    assert ended(updated, tx) == "confirmed"
    found = instarctl(updated, "watch")
    assert (found.exit_code, "updater runs 1.0.0" in found.stdout) == (0, True), found.output


def test_who_ordered_a_rollback_that_is_lost_is_told_and_waits_no_longer(updated: Host) -> None:
    with loop_asks(updated):
        words = [*updated.words()[:4], "rollback", "--state", str(updated.layout.state)]
        waiting = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_for(updated.layout.orders.exists, PASSING_S, updated.log)
        wait_for(lambda: not has_socket(waiting.pid), PASSING_S, updated.log)  # it was told the name
        assert updated.process is not None
        updated.process.kill()
        updated.process.wait()
        updated.layout.orders.unlink()  # as when its disk has lost it
        updated.start()
        said, _ = waiting.communicate(timeout=PASSING_S)
    assert (waiting.returncode, "nothing came of tx-" in said) == (2, True), said
    assert "(unknown-transaction)" in said


def has_socket(pid: int) -> bool:
    """Whether the process has one open: it waits for an answer."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(fd).startswith("socket:"):
                return True
    return False


def instarctl(host: Host, *words: str) -> Result:
    certificate, key = (str(path) for path in host.operator)
    papers = ("--cert", certificate, "--key", key, "--ca", str(host.papers.ca))
    return CliRunner().invoke(
        app, ["updater", *words, "--node", NODE, "--address", f"127.0.0.1:{host.port}", *papers]
    )
