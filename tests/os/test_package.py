"""The Debian packages on a Debian with systemd: installed, enrolled, updated by itself, upgraded, removed, purged."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from instar.cli.units import GUARD
from instar.core.errors import InstarError
from instar_lab import machine
from instar_lab.container import Container
from instar_lab.deb import server_package
from tests.os.conftest import CRASHES, NEW, OLD
from tests.os.node import AGENT, API_SOCKET, LINES, SOCKET, STATE, TIMER, UNITS, UPDATER, outcomes
from tests.os.packaged import PACKAGE_UNITS, WANTS, PackagedNode
from tests.os.test_systemd import exposure

SERVER, DATA = "instar-server.service", "/var/lib/instar-server"
MOST_EXPOSED = {AGENT: 5.0, UPDATER: 3.0, GUARD: 3.0, SERVER: 3.0}  # 0 to 10, by `systemd-analyze security`

pytestmark = pytest.mark.xdist_group("containers")


def links(node: PackagedNode) -> list[str]:
    """What is left or made of ours where systemd keeps what an administrator decided."""
    return node.container.do("find", "/etc/systemd", "/var/lib/systemd", "-name", "*instar*").split()


def test_from_the_package_to_a_purge(packaged: PackagedNode) -> None:
    node = packaged
    said = node.install_package(OLD)
    assert "instar install --embed" in said
    assert not node.layout.state.exists()
    node.container.do("systemctl", "start", AGENT, UPDATER)  # whose condition is not met
    assert node.residents() == []
    assert not node.layout.state.exists()

    printed = node.enrol(OLD)
    assert "kept running by systemd" in printed
    for unit in UNITS:
        assert node.container.property(unit, "FragmentPath") in (
            f"{PACKAGE_UNITS}/{unit}",
            f"/lib/systemd/system/{unit}",
        )
        assert node.container.property(unit, "UnitFileState") == "enabled"
        assert node.active(unit) == "active"
    assert node.active(API_SOCKET) == "inactive"
    assert all(".wants/" in link for link in links(node)), links(node)
    assert node.container.run("systemctl", "--failed", "--no-legend").stdout == ""
    node.connected()

    owned = node.owned()
    node.want(NEW)
    assert outcomes(node.settled(2)) == [(line, NEW, "confirmed") for line in LINES]
    assert node.owned() == owned  # an update writes nothing that the package owns
    assert node.container.do("dpkg", "-V", "instar") == ""

    upgraded_and_removed(node)
    node.dpkg("--purge", "instar")
    assert not node.layout.state.exists()
    assert node.residents() == []
    assert links(node) == []
    assert node.container.run("dpkg", "-s", "instar").returncode != 0
    for unit in (*UNITS, API_SOCKET):
        assert node.container.property(unit, "LoadState") == "not-found"


def upgraded_and_removed(node: PackagedNode) -> None:
    """An upgrade changes nothing that runs; a removal stops all of it, and keeps what is the node's."""
    runs = {unit: node.pid(unit) for unit in (AGENT,)}
    launcher = node.layout.launcher.read_bytes()
    node.install_package(CRASHES)  # a release that would not stay up, if anything of it ran
    assert {unit: node.pid(unit) for unit in (AGENT,)} == runs
    assert node.layout.launcher.read_bytes() == launcher
    assert node.versions() == {"agent": NEW, "updater": NEW}

    kept = sorted(path.name for path in node.layout.state.iterdir())
    node.dpkg("--remove", "instar")
    assert node.residents() == []
    assert sorted(path.name for path in node.layout.state.iterdir()) == kept
    before = node.connected_since()
    node.install_package(NEW)
    node.connected(after=before)
    assert node.versions()["agent"] == NEW
    node.dpkg("--remove", "instar")
    assert node.residents() == []


@pytest.mark.os
def test_package_is_upgraded_and_removed_in_the_middle_of_a_transaction(packaged: PackagedNode) -> None:
    node = packaged
    for version in (CRASHES, NEW):
        node.package(version)  # built ahead: a trial does not wait for it
    node.set_up(OLD, hold_s=8.0)
    node.want(NEW)
    switch = node.layout.line("agent")

    def on_trial() -> bool:
        return switch.trial.exists() and switch.current.readlink().name.startswith(NEW)

    machine.wait_for(
        lambda: on_trial() and node.versions()["agent"] == NEW, "a release on trial", 60.0, node.words, every_s=0.02
    )  # fmt: skip
    agent = node.pid(AGENT)
    node.install_package(CRASHES)
    assert node.pid(AGENT) == agent
    assert on_trial()
    node.dpkg("--remove", "instar")  # the transaction stays open, and nothing of it runs
    assert node.residents() == []
    assert switch.trial.exists()
    before = node.connected_since()
    node.install_package(NEW)
    node.connected(after=before)
    entries = node.settled(2)
    assert [each["line"] for each in entries] == list(LINES)
    last = entries[-1]
    runs = NEW if last["state"] == "confirmed" else OLD
    assert node.versions()["agent"] == runs, last


@pytest.mark.os
def test_power_cut_and_reboot_of_a_packaged_node(packaged: PackagedNode) -> None:
    node = packaged
    node.set_up(OLD)
    before = node.connected_since()
    node.container.cut_power()
    node.container.boot()
    since = node.connected(after=before)
    assert (node.active(SOCKET), node.active(TIMER)) == ("active", "active")
    node.container.shut_down()
    node.container.boot()
    node.connected(after=since)


@pytest.mark.os
def test_the_port_of_the_updaters_api_is_the_configs(packaged: PackagedNode) -> None:
    """It is listened on by systemd; another address is a drop-in beside the packaged unit; '' is none."""
    node = packaged
    one, other = machine.free_port(), machine.free_port()
    node.api = f"127.0.0.1:{one}"
    node.install(OLD)
    assert node.container.property(API_SOCKET, "Listen") == f"{node.api} (Stream)"
    assert node.active(API_SOCKET) == "active"
    assert node.container.property(API_SOCKET, "UnitFileState") == "enabled"

    config = node.layout.config.read_text()
    node.layout.config.write_text(config.replace(str(one), str(other)))
    node.cli("start")
    assert node.container.property(API_SOCKET, "Listen") == f"127.0.0.1:{other} (Stream)"
    assert all(line["answers"] for line in node.status()["lines"].values())

    node.layout.config.write_text(config.replace(node.api, ""))
    node.cli("start")
    assert node.active(API_SOCKET) == "inactive"
    assert node.active(SOCKET) == "active"
    assert [link for link in links(node) if "api" in link] == []

    with socket.create_server(("127.0.0.1", one)):  # another program has it
        node.layout.config.write_text(config)
        node.cli("start")
        assert node.active(API_SOCKET) == "failed"
        assert node.active(SOCKET) == "active"
        assert all(line["answers"] for line in node.status()["lines"].values())


@pytest.mark.os
def test_purge_where_python_and_launcher_are_damaged(packaged: PackagedNode) -> None:
    node = packaged
    node.set_up(OLD)
    node.layout.launcher.write_bytes(bytes(1000))
    node.dpkg("--purge", "instar")
    assert not node.layout.state.exists()
    assert node.residents() == []
    assert links(node) == []


@pytest.mark.os
def test_a_node_that_was_there_before_the_package_keeps_its_units(packaged: PackagedNode) -> None:
    node = packaged
    super(PackagedNode, node).install(OLD)
    node.connected()
    agent = node.pid(AGENT)
    node.install_package(NEW)
    assert node.container.property(AGENT, "FragmentPath") == f"{WANTS}/{AGENT}"
    node.dpkg("--remove", "instar")
    assert node.pid(AGENT) == agent
    node.dpkg("--purge", "instar")
    assert node.pid(AGENT) == agent
    assert node.layout.node.exists()
    shutil.copy(node.container.root / "root/instar.pyz", node.container.root / "root/again.pyz")
    node.container.do("python3", "/root/again.pyz", "uninstall")
    assert links(node) == []
    assert not (node.container.root / STATE.lstrip("/")).exists()


@pytest.mark.os
def test_a_unit_that_an_administrator_has_replaced_stays(packaged: PackagedNode) -> None:
    node = packaged
    node.install_package(OLD)
    root = node.container.root
    unit = (root / PACKAGE_UNITS.lstrip("/") / AGENT).read_text().replace("=Instar agent", "=My agent")
    own = root / WANTS.lstrip("/") / AGENT
    own.write_text(unit)
    node.enrol(OLD)
    node.connected()
    assert node.container.property(AGENT, "Description") == "My agent"
    assert own.read_text() == unit
    node.dpkg("--remove", "instar")
    assert node.residents() == []
    node.dpkg("--purge", "instar")
    assert not node.layout.state.exists()
    assert own.read_text() == unit


@pytest.mark.os
def test_server_package(container: Container, tmp_path: Path) -> None:
    """Its user, its data, a start, a reboot, an upgrade, and what a removal and a purge leave."""
    package = server_package("1.0.0", tmp_path)
    shutil.copyfile(package, container.root / "root/server.deb")
    said = container.do("dpkg", "-i", "/root/server.deb", within_s=180.0)
    assert "instar-server init" in said
    assert container.property(SERVER, "UnitFileState") == "enabled"
    assert exposure(container, SERVER) <= MOST_EXPOSED[SERVER]
    container.do("systemctl", "start", SERVER)
    assert container.property(SERVER, "ActiveState") == "inactive"  # nothing to serve yet

    prepared(container)
    container.do("systemctl", "start", SERVER)
    answers(container)
    owner = container.do(
        "stat", "--format=%U %a", DATA, f"{DATA}/server.db", f"{DATA}/ca/key.pem"
    ).splitlines()
    assert owner == ["instar-server 700", "instar-server 600", "instar-server 600"]
    container.shut_down()
    container.boot()
    answers(container)

    old = container.property(SERVER, "MainPID")
    container.do("dpkg", "-i", "/root/server.deb", within_s=180.0)
    answers(container)
    assert container.property(SERVER, "MainPID") != old
    container.do("dpkg", "--purge", "instar-server", within_s=60.0)
    assert not [seen for seen in container.processes() if "instar-server" in " ".join(seen.words)]
    assert (container.root / DATA.lstrip("/") / "ca/key.pem").exists()
    left = (
        container.do("find", "/usr/lib/instar-server", "/usr/bin", "-path", "*instar*")
        if (container.root / "usr/lib/instar-server").exists()
        else ""
    )
    assert left == ""


@pytest.mark.os
def test_server_package_goes_when_its_folder_went_before(container: Container, tmp_path: Path) -> None:
    shutil.copyfile(server_package("1.0.0", tmp_path), container.root / "root/server.deb")
    container.do("dpkg", "-i", "/root/server.deb", within_s=180.0)
    container.do("rm", "-r", "/usr/lib/instar-server")
    container.do("dpkg", "--purge", "instar-server")
    assert container.run("dpkg", "-s", "instar-server").returncode != 0


def prepared(container: Container) -> None:
    """Keys made inside by the packaged instarctl, and the server's folder by its `init`."""
    (container.root / "root/secret").write_text("only for this test\n")
    container.do("instarctl", "keys", "ceremony", "--out", "/root/KEYS", "--passphrase-file", "/root/secret")
    container.do(
        "instar-server", "init", "--data", DATA, "--host", "localhost", "--root", "/root/KEYS/root.json",
        "--online", "/root/KEYS/online", "--bind", "127.0.0.1", "--gateway-port", "0", "--api-port", "0",
    )  # fmt: skip


def answers(container: Container) -> None:
    pid = container.property(SERVER, "MainPID")

    def ready() -> bool:
        try:
            return str(json.loads(container.do("cat", f"{DATA}/run/ports.json"))["pid"]) == pid
        except (InstarError, ValueError):
            return False

    said = "\n".join(line.text for line in container.journal(SERVER))
    machine.wait_for(ready, "a listening server", 60.0, lambda: said)


@pytest.mark.os
def test_packaged_units_are_hardened(packaged: PackagedNode) -> None:
    packaged.install_package(OLD)
    for unit in (AGENT, UPDATER, GUARD):
        assert exposure(packaged.container, unit) <= MOST_EXPOSED[unit]
