"""interfaces.list and disk.usage in real runners, against what other programs and the kernel say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import Module

Get = Callable[[str], Module]
KEYS = {
    "name",
    "index",
    "kind",
    "mac",
    "mtu",
    "up",
    "state",
    "speed_mbit",
    "addresses",
    "rx_bytes",
    "tx_bytes",
}


def ip_addr() -> list[dict[str, Any]]:
    if shutil.which("ip") is None:
        pytest.skip("ip is not on this machine")
    done = subprocess.run(["ip", "-j", "addr"], capture_output=True, check=True, timeout=10)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


class TestInterfaces:
    def test_all_are_as_ip_shows_them(self, first_day: Get) -> None:
        reply = first_day("interfaces.list").run({"all": True}).reply
        assert (reply["left_out"], reply["cut"]) == (0, 0)
        shown = {one["name"]: one for one in reply["interfaces"]}
        expected = {one["ifname"]: one for one in ip_addr()}
        assert shown.keys() == expected.keys()
        for name, its in expected.items():
            one = shown[name]
            assert one.keys() >= KEYS
            assert (one["mtu"], one["index"]) == (its["mtu"], its["ifindex"])
            assert one["up"] == ("UP" in its["flags"])
            assert one["state"] == its["operstate"].lower().replace("lowerlayerdown", "lower-layer-down")
            assert (one["mac"] or "00:00:00:00:00:00") == its.get("address", "00:00:00:00:00:00")
            addresses = {(a["local"], a["prefixlen"], a["scope"]) for a in its["addr_info"]}
            assert {(a["address"], a["prefix"], a["scope"]) for a in one["addresses"]} == addresses

    def test_loopback_and_what_is_off_is_left_out_and_counted(self, first_day: Get) -> None:
        reply = first_day("interfaces.list").run().reply
        assert reply["left_out"] > 0
        assert all(one["up"] and one["kind"] != "loopback" for one in reply["interfaces"])

    def test_one_by_its_name(self, first_day: Get) -> None:
        reply = first_day("interfaces.list").run({"name": "lo"}).reply
        [lo] = reply["interfaces"]
        assert (lo["name"], lo["kind"], lo.get("left_out", 0)) == ("lo", "loopback", 0)
        assert "127.0.0.1" in [address["address"] for address in lo["addresses"]]
        assert lo["rx_bytes"] == lo["tx_bytes"]
        assert lo["rx_bytes"] >= int(Path("/sys/class/net/lo/statistics/rx_bytes").read_text()) - (1 << 30)

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ({"name": "nope0"}, "expected one of "),
            ({"name": 7}, "expected a text as 'name', got 7"),
            ({"name": ""}, "expected a text as 'name'"),
            ({"all": "yes"}, "expected true or false as 'all', got 'yes'"),
            ({"al": True}, "expected 'name' or 'all', got 'al'"),
            ({"name": "../../etc/passwd"}, "expected one of "),
        ],
    )
    def test_wrong_arguments(self, first_day: Get, args: dict[str, Any], words: str) -> None:
        assert words in first_day("interfaces.list").error(args)

    def test_hundreds_of_interfaces_fit_in_a_reply(self, first_day: Get) -> None:
        """In a network namespace of its own, with 400 of them and 100 addresses on one."""
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("needs root and ip")
        with namespace("instar-many") as name:
            kind = next(
                (kind for kind in ("dummy", "ifb") if add(name, [f"link add dum0 type {kind}"])), None
            )
            if kind is None:
                pytest.skip("no kind of interface here that can be made")
            assert add(name, [f"link add dum{number} type {kind}" for number in range(1, 400)])
            assert add(name, [f"addr add 10.9.0.{number}/32 dev dum0" for number in range(1, 101)])
            reply = in_namespace(name, lambda: first_day("interfaces.list").run({"all": True}).reply)
        assert len(reply["interfaces"]) + reply["cut"] >= 401
        assert len(reply["interfaces"]) > 300
        dum0 = next(one for one in reply["interfaces"] if one["name"] == "dum0")
        assert (dum0["kind"], len(dum0["addresses"]), dum0["more_addresses"]) == (kind, 64, 36)


@contextmanager
def namespace(name: str) -> Iterator[str]:
    done = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, timeout=10, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no network namespaces here: {done.stderr[:80]}")
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)


def add(name: str, lines: list[str]) -> bool:
    done = subprocess.run(
        ["ip", "-n", name, "-batch", "-"],
        input="\n".join(lines),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode == 0


def in_namespace(name: str, work: Callable[[], Any]) -> Any:
    """Run `work` with this thread in the network namespace: what it starts is in it as well."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    try:
        assert libc.setns(there, 0x40000000) == 0, os.strerror(ctypes.get_errno())
        return work()
    finally:
        assert libc.setns(home, 0x40000000) == 0
        os.close(home)
        os.close(there)


class TestDisks:
    def test_sizes_are_as_the_kernel_says(self, first_day: Get) -> None:
        reply = first_day("disk.usage").run().reply
        assert reply["cut"] == 0
        assert {one["mount"] for one in reply["file_systems"]} >= {"/"}
        for one in reply["file_systems"]:
            if "problem" in one:
                continue
            seen = os.statvfs(one["mount"])
            assert one["size"] == seen.f_blocks * seen.f_frsize
            assert one["inodes"] == pytest.approx(seen.f_files, rel=0.05)
            assert one["free"] == pytest.approx(seen.f_bavail * seen.f_frsize, rel=0.05, abs=64 << 20)
            assert one["used"] + one["free"] <= one["size"]
            assert one["read_only"] == bool(seen.f_flag & os.ST_RDONLY)
            assert 0 <= one["used_percent"] <= 100

    def test_all_shows_every_mount_that_can_be_seen(self, first_day: Get) -> None:
        reply = first_day("disk.usage").run({"all": True}).reply
        points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
        assert {one["mount"] for one in reply["file_systems"]} == points
        assert {one["type"] for one in reply["file_systems"]} >= {"proc"}
        few = first_day("disk.usage").run().reply
        assert len(few["file_systems"]) < len(reply["file_systems"])
        assert few["left_out"] > 0

    def test_the_one_that_holds_a_path(self, first_day: Get, tmp_path: Path) -> None:
        deep = tmp_path / "a b\n\u00e4" / "c"
        deep.mkdir(parents=True)
        link = tmp_path / "link"
        link.symlink_to(deep)
        reply = first_day("disk.usage").run({"path": str(link)}).reply
        [one] = reply["file_systems"]
        assert reply["path"] == str(deep.resolve())
        assert one["size"] == os.statvfs(deep).f_blocks * os.statvfs(deep).f_frsize
        [proc] = first_day("disk.usage").run({"path": "/proc/self/status"}).reply["file_systems"]
        assert (proc["mount"], proc["type"], proc["size"], proc["used_percent"]) == ("/proc", "proc", 0, 0)

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ({"path": "var"}, "expected an absolute path as 'path'"),
            ({"path": ""}, "expected an absolute path as 'path'"),
            ({"path": "/" + "x" * 5000}, "expected an absolute path as 'path'"),
            ({"path": "/nope/there"}, "No such file or directory"),
            ({"path": 7}, "'path': expected a text"),
            ({"all": 1}, "'all': expected true or false"),
            ({"everything": True}, "expected only 'path', 'all' or 'network'"),
            ({"all": True, 'x"y:{': {"path": 1}}, "expected only 'path', 'all' or 'network'"),
        ],
    )
    def test_wrong_arguments(self, first_day: Get, args: dict[str, Any], words: str) -> None:
        assert words in first_day("disk.usage").error(args)

    def test_strange_names_and_second_mounts(self, first_day: Get, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        strange = tmp_path / "a b\\c\td\n\u00e4"
        raw = os.fsencode(tmp_path) + b"/bad\xff"
        second = tmp_path / "second"
        for folder in (os.fsencode(strange), raw, os.fsencode(second)):
            os.mkdir(folder)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "none \\x", strange],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"no mounts here: {done.stderr}")
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", raw], check=True)
            subprocess.run(["mount", "--bind", raw, second], check=True)
            reply = first_day("disk.usage").run().reply
            whole = first_day("disk.usage").run({"all": True}).reply
        finally:
            for folder in (os.fsencode(second), raw, os.fsencode(strange)):
                subprocess.run(["umount", folder], check=False, capture_output=True)
        shown = {one["mount"]: one for one in reply["file_systems"]}
        assert (shown[str(strange)]["size"], shown[str(strange)]["read_only"]) == (1 << 20, True)
        assert shown[str(strange)]["source"] == "none \\x"
        bad = f"{tmp_path}/bad\ufffd"
        assert len({bad, str(second)} & shown.keys()) == 1
        assert {bad, str(second)} <= {one["mount"] for one in whole["file_systems"]}

    def test_a_file_system_that_never_answers_holds_nobody(self, first_day: Get, tmp_path: Path) -> None:
        """A FUSE mount whose server takes the mount and then says nothing."""
        with silent_fuse(tmp_path / "silent") as point:
            reply = first_day("disk.usage").run().reply
            shown = {one["mount"]: one for one in reply["file_systems"]}
            assert "not asked" in shown[point]["problem"]
            assert "size" in shown["/"]
            end = first_day("disk.usage").run({"network": True})
            shown = {one["mount"]: one for one in end.reply["file_systems"]}
            assert shown[point]["problem"] == "no answer within 2 s"
            assert "size" in shown["/"]
            assert "no answer within 2 s" in first_day("disk.usage").error({"path": f"{point}/x"})


@contextmanager
def silent_fuse(folder: Path) -> Iterator[str]:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("needs root and FUSE")
    folder.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    try:
        if libc.mount(b"silent", os.fsencode(folder), b"fuse.silent", 0, options.encode()):
            pytest.skip(f"no FUSE mounts here: {os.strerror(ctypes.get_errno())}")
        yield str(folder)
    finally:
        os.close(fd)  # the kernel ends the connection, and whoever waits
        libc.umount2(os.fsencode(folder), 2)
