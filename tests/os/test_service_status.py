"""The module service.status among real service managers: systemd, OpenRC and runit of Debian."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar_lab import machine
from instar_lab.container import Container

pytestmark = pytest.mark.xdist_group("containers")

SOURCE = Path(__file__).resolve().parents[2] / "modules/service.status/services.py"
ASK = "import json, sys; sys.path.insert(0, '/root'); import services; print(json.dumps(services.run(json.loads(sys.argv[1]), None)))"
OPENRC = ("sh", "-c", "openrc sysinit; openrc default; exec sleep infinity")
RUNIT = ("runsvdir", "-P", "/etc/service")

Ask = Callable[..., dict[str, Any]]


def asker(container: Container) -> Ask:
    """ask(names=[…]): the module's reply, from inside."""
    shutil.copy(SOURCE, container.root / "root/services.py")
    return lambda **args: dict(json.loads(container.do("python3", "-I", "-S", "-c", ASK, json.dumps(args))))


def states(reply: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["state"] for one in reply["services"]}


@pytest.fixture
def booted(other_tree: Path) -> Iterator[Callable[[tuple[str, ...]], Container]]:
    """Boots a container without systemd."""
    folder, opened = Path(tempfile.mkdtemp(prefix="ios-")), []

    def boot(first: tuple[str, ...]) -> Container:
        container = Container(other_tree, folder / "box", first)
        container.__enter__()
        opened.append(container)
        return container

    try:
        yield boot
    finally:
        for container in opened:
            container.close()
        shutil.rmtree(folder, ignore_errors=True)


def write(container: Container, path: str, text: str) -> None:
    """From inside: some of these folders are links to absolute paths."""
    code = 'mkdir -p "$(dirname "$1")" && printf %s "$2" > "$1" && chmod 755 "$1"'
    container.do("sh", "-c", code, "sh", f"/{path}", text)


def test_systemd(container: Container) -> None:
    for name, command in (("stays", "sleep 600"), ("falls", "false"), ("once", "true")):
        kind = "Type=oneshot\nRemainAfterExit=yes\n" if name == "once" else ""
        unit = f"[Unit]\nDescription=It {name} = always\n[Service]\n{kind}ExecStart=/bin/{command}\n"
        (container.root / f"etc/systemd/system/{name}.service").write_text(unit)
    container.do("systemctl", "daemon-reload")
    for name in ("stays", "falls", "once"):
        container.run("systemctl", "start", f"{name}.service")
    machine.wait_for(
        lambda: container.run("systemctl", "is-failed", "falls").returncode == 0, "the fall", 60.0
    )
    ask = asker(container)
    reply = ask(names=["stays", "falls.service", "once", "no-such-thing", "multi-user.target"])
    assert reply["manager"] == "systemd"
    assert states(reply) == {
        "stays": "running", "falls": "failed", "once": "finished", "no-such-thing": "not-found",
        "multi-user.target": "running",
    }  # fmt: skip
    found = {one["name"]: one for one in reply["services"]}
    assert found["stays"]["pid"] == int(container.property("stays.service", "MainPID"))
    assert found["stays"]["description"] == "It stays = always"
    assert 0 <= found["stays"]["for_s"] < 60
    assert (found["falls"]["result"], found["falls"]["exit_status"]) == ("exit-code", 1)
    assert set(states(ask(failed=True))) == {"falls"}
    everything = states(ask())
    assert everything["systemd-journald"] == "running"
    assert "no-such-thing" not in everything
    assert len(everything) > 5
    container.do("systemctl", "reset-failed")
    assert ask(failed=True)["services"] == []


def test_openrc(booted: Callable[[tuple[str, ...]], Container]) -> None:
    container = booted(OPENRC)
    soft = "/run/openrc/softlevel"
    machine.wait_for(lambda: container.run("test", "-e", soft).returncode == 0, soft, 60.0)
    head = "#!/sbin/openrc-run\n"
    daemon = 'command="/bin/sleep"\ncommand_args="600"\ncommand_background=true\npidfile="/run/${RC_SVCNAME}.pid"\n'
    write(container, "etc/init.d/stays", head + daemon)
    write(container, "etc/init.d/crashes", head + daemon)
    write(container, "etc/init.d/falls", head + "start() {\n  return 1\n}\n")
    write(container, "etc/init.d/off", head + daemon)
    for name in ("stays", "crashes", "falls"):
        container.run("rc-service", name, "start")
    container.do("sh", "-c", "kill -9 $(cat /run/crashes.pid)")
    ask = asker(container)
    machine.wait_for(lambda: states(ask(names=["crashes"]))["crashes"] == "failed", "the crash", 60.0)
    reply = ask(names=["stays", "crashes", "off", "no-such-thing"])
    assert reply["manager"] == "openrc"
    assert states(reply) == {
        "stays": "running", "crashes": "failed", "off": "stopped", "no-such-thing": "not-found",
    }  # fmt: skip
    pid = int(container.do("cat", "/run/stays.pid"))
    assert next(one["pid"] for one in reply["services"] if one["name"] == "stays") == pid
    assert {"stays", "crashes", "off", "falls"} <= states(ask()).keys()
    for name, status in (("stays", 0), ("off", 3)):  # as its own program says
        assert container.run("rc-service", name, "status").returncode == status


def test_runit(booted: Callable[[tuple[str, ...]], Container]) -> None:
    container = booted(RUNIT)
    write(container, "etc/service/stays/run", "#!/bin/sh\nexec sleep 600\n")
    write(container, "etc/service/falls/run", "#!/bin/sh\nsleep 0.2\nexit 1\n")
    write(container, "etc/service/off/run", "#!/bin/sh\nexec sleep 600\n")
    write(container, "etc/service/off/down", "")
    ask = asker(container)

    def seen() -> dict[str, str] | None:
        found = states(ask())
        return found if found.get("stays") == "running" and found.get("off") == "stopped" else None

    machine.wait_for(seen, "runsv to be there", 60.0)
    reply = ask(names=["stays", "no-such-thing"])
    assert reply["manager"] == "runit"
    assert states(reply) == {"stays": "running", "no-such-thing": "not-found"}
    status = container.do("sv", "status", "/etc/service/stays")
    assert f"(pid {reply['services'][1]['pid']})" in status
    machine.wait_for(lambda: states(ask())["falls"] == "failed", "the fall to be seen", 60.0, every_s=0.05)
    container.do("sv", "down", "/etc/service/stays")
    machine.wait_for(lambda: states(ask())["stays"] == "stopped", "it to be down", 60.0)
