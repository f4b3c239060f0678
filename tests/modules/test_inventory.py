"""inventory in a real runner: what the machine is, against /proc and other programs, and what became different."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from instar_lab import machine
from tests.modules.conftest import Module, Service

Get = Callable[[str], Module]


@pytest.fixture
def module(first_day: Get) -> Module:
    return first_day("inventory")


@pytest.fixture
def service(module: Module, tmp_path: Path) -> Iterator[Service]:
    with module.serve(tmp_path / "data") as running:
        yield running


class TestParts:
    def test_hardware(self, service: Service) -> None:
        found = service.ask("get", part="hardware")["hardware"]
        info = Path("/proc/cpuinfo").read_text()
        assert found["cpu"]["logical"] == info.count("\nprocessor\t") + info.startswith("processor")
        assert found["machine"] == platform.machine()
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        assert abs(found["memory"]["total_mib"] - total) <= 1
        for name, disk in found["disks"].items():
            assert disk["size"] == int(Path(f"/sys/block/{name}/size").read_text()) * 512

    def test_disks_are_as_lsblk_shows_them(self, service: Service) -> None:
        if shutil.which("lsblk") is None:
            pytest.skip("lsblk is not on this machine")
        done = subprocess.run(
            ["lsblk", "--json", "--bytes", "--nodeps", "-o", "NAME,TYPE,SIZE"],
            capture_output=True,
            check=True,
            timeout=10,
        )
        expected = {
            one["name"]: int(one["size"])
            for one in json.loads(done.stdout)["blockdevices"]
            if one["type"] == "disk" and int(one["size"]) and not one["name"].startswith("zram")
        }
        shown = service.ask("get", part="hardware")["hardware"]["disks"]
        assert {name: disk["size"] for name, disk in shown.items()} == expected

    def test_system(self, service: Service) -> None:
        found = service.ask("get", part="system")["system"]
        assert (found["name"], found["kernel"]) == (os.uname().nodename, os.uname().release)
        assert found["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert found["os_id"] == platform.freedesktop_os_release()["ID"]
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        assert abs(found["uptime_s"] - uptime) < 30
        assert found["timezone"]

    def test_ports_and_who_listens(self, service: Service) -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as four,
            socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as low,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
        ):
            low.bind(("127.0.0.1", machine.free_port()))
            asking.bind(("127.0.0.1", 0))  # in the kernel's own range: not a service
            places = [
                f"tcp 127.0.0.1:{port_of(four)}",
                f"tcp [::1]:{port_of(six)}",
                f"udp 127.0.0.1:{port_of(low)}",
            ]
            left_out = f"udp 127.0.0.1:{port_of(asking)}"
            service.ask("refresh")
            found = service.ask("get", part="ports")["ports"]
        for place in places:
            assert found[place]["uid"] == os.geteuid()
            assert found[place]["known_by"] in ("descriptor", "group", "")
        assert left_out not in found

    def test_the_service_that_listens(self, service: Service) -> None:
        """By its control group: Landlock keeps a module from the descriptors of other processes."""
        with own_group(group := f"instar-test-inventory-{os.getpid()}.service") as join:
            code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); time.sleep(60)"
            listener = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, text=True, preexec_fn=join
            )
            try:
                assert listener.stdout is not None
                port = int(listener.stdout.readline())
                service.ask("refresh")
                found = service.ask("get", part="ports")["ports"][f"tcp 127.0.0.1:{port}"]
                name = Path(f"/proc/{listener.pid}/comm").read_text().strip()
            finally:
                listener.kill()
                listener.wait()
        assert found["group"] == f"/{group}"
        assert (found["programs"], found["known_by"] in ("group", "descriptor")) == ([name], True)

    def test_processes(self, service: Service) -> None:
        found = service.ask("get", part="processes")["processes"]
        here = sum(name.isdecimal() for name in os.listdir("/proc"))
        assert abs(found["count"] - here) < 20 + here // 2
        assert found["threads"] >= found["count"]
        assert len(found["by_memory"]) <= 10
        assert sum(found["states"].values()) == found["count"]

    def test_all_at_once_fits(self, service: Service) -> None:
        reply = service.ask("get")
        assert {"hardware", "system", "ports", "processes", "at", "last"} <= reply.keys()
        assert len(json.dumps(reply)) < 240 << 10

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ({"do": "get", "part": "soul"}, "expected one of hardware, system, ports, processes"),
            ({"do": "get", "part": 7}, "cannot get 7"),
            ({"do": "get", "prt": "system"}, "got 'prt'"),
            ({"do": "burn"}, "expected one of get, changes, refresh"),
            ({"do": "changes", "since": "all"}, "'since': expected 0 to"),
            ({"do": "changes", "since": 1000}, "the last one has the number"),
            ({"do": "changes", "limit": 0}, "'limit': expected 1 to 200, got 0"),
        ],
    )
    def test_wrong_questions(self, service: Service, args: dict[str, Any], words: str) -> None:
        assert words in service.refusal(args)


class TestChanges:
    def test_a_port_that_opens_and_closes(self, service: Service) -> None:
        before = service.ask("changes")["last"]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            place = f"tcp 127.0.0.1:{listener.getsockname()[1]}"
            assert service.ask("refresh")["new"] > 0
            told = service.ask("changes", since=before)["changes"]
            mine = [one for one in told if one["key"].startswith(f"{place}.")]
            assert {one["change"] for one in mine} == {"added"}
            assert {one["part"] for one in mine} == {"ports"}
        service.ask("refresh")
        told = service.ask("changes", since=before)["changes"]
        assert {one["change"] for one in told if one["key"].startswith(f"{place}.")} == {"added", "removed"}
        assert [one["n"] for one in told] == list(range(before + 1, before + 1 + len(told)))

    @pytest.mark.parametrize("kill", [True, False])
    def test_what_became_different_while_it_was_away(
        self, module: Module, tmp_path: Path, kill: bool
    ) -> None:
        data = tmp_path / "data"
        service = module.start(data)
        service.ask("refresh")
        last = service.ask("changes")["last"]
        if kill:
            service.kill()
        else:
            service.stop()
        path = data / "state.json"
        state = json.loads(path.read_bytes())
        state["parts"]["system"]["kernel"] = "0.0.1-old"
        state["parts"]["hardware"]["disks"]["sdz"] = {"size": 1}
        path.write_text(json.dumps(state))
        with module.serve(data) as again:
            told = again.ask("changes", since=last)["changes"]
            found = {one["key"]: one for one in told}
            assert found["kernel"]["before"] == "0.0.1-old"
            assert found["kernel"]["after"] == os.uname().release
            assert (found["disks.sdz.size"]["change"], found["disks.sdz.size"]["before"]) == ("removed", "1")
            newest = again.ask("changes")["last"]
        with module.serve(data) as third:
            # Others may be at work on this machine, so there may be changes; but none is told twice.
            told = third.ask("changes", since=newest)["changes"]
            assert not {one["key"] for one in told} & {"kernel", "disks.sdz.size"}

    def test_a_damaged_state_does_not_keep_it_from_starting(self, module: Module, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        (data / "state.json").write_bytes(b"\0" * 100)
        with module.serve(data) as service:
            assert service.ask("changes")["last"] == 0


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


@contextmanager
def own_group(name: str) -> Iterator[Callable[[], None]]:
    """A control group at the top; what it gives puts the calling process in it."""
    places = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")
    top = next((Path(place) for place in places if Path(place, "cgroup.controllers").exists()), None)
    if top is None or os.geteuid() != 0:
        pytest.skip("needs root and version 2 of control groups")
    folder = top / name
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no group can be made here: {error}")
    try:
        yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))  # type: ignore[return-value]
    finally:
        folder.rmdir()
