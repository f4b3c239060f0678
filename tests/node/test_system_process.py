"""Line os through a real server and a real updater's process: wishes, reports, the switch, orders, refusals."""

from __future__ import annotations

import signal
import ssl
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from instar.core.errors import ServerRefused
from instar_lab import machine as lab
from tests.node.system_host import READY_S, Hall, SystemHost
from tests.node.tls_server import TlsServer, answer


def test_wish_of_the_server_fills_the_other_slot_and_its_bytes_are_told(hall: Hall, folder: Path) -> None:
    host = SystemHost(hall, folder, rate=150_000)  # 10 s, in which it is looked at now and then
    try:
        host.start()
        host.connected()
        running = host.machine.slot_data("a")
        seen = []
        made = host.update_os("lab-1.2.0", "none")
        while (view := host.system())["updates"][0]["state"] == "open":
            if view["update"]:
                seen.append((view["update"]["step"], view["update"]["slot"], view["update"]["done"]))
            time.sleep(0.3)
        row = view["updates"][0]
        assert (row["state"], row["outcome"], row["slot"]) == ("confirmed", "installed, not active", "b"), row
        done = [each[2] for each in seen if each[:2] == ("stage", "b")]
        assert done == sorted(done)
        assert len(set(done)) >= 3, seen
        new = hall.images["1.2.0"]
        assert host.machine.slot_data("b").startswith(new.root)
        assert host.machine.boot.kernel("b").read_bytes() == new.kernel
        assert host.machine.slot_data("a") == running
        record = host.machine.records()["b"]
        assert (record.version, record.digest, record.state) == ("1.2.0", new.digest, "installed")
        assert row["fetched"] < len(new.root), "what the running slot has is not fetched"
        assert row["reused"] > 300 << 10
        assert (view["running"], view["backend"], view["boot"]["order"][:1]) == ("a", "firmware", ["a"])
        assert host.machine.down == ""
        assert made["generation"] == host.begins()[0].generation
    finally:
        host.close()


class Elsewhere(TlsServer):
    """Serves one file by ranges, with a certificate of the fleet's CA; notes what certificates it is shown."""

    def __init__(self, hall: Hall, file: Path) -> None:
        self._data = file.read_bytes()
        self.shown: set[object] = set()
        super().__init__(Chain(hall.server.layout.certificate), self._serve)  # type: ignore[arg-type]
        self.context.verify_mode = ssl.CERT_OPTIONAL
        self.context.load_verify_locations(str(hall.server.ca))

    def _serve(self, line: str, headers: dict[str, str], secure: ssl.SSLSocket) -> bool:
        self.shown.add(secure.getpeercert() or None)
        first, _, last = headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        data = self._data[int(first) : int(last) + 1 if last else None]
        return answer(secure, data, "206 Partial Content" if "range" in headers else "200 OK")

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Chain(NamedTuple):
    chain: Path


def boots(host: SystemHost, slot: str, by: str = "firmware") -> None:
    """The machine goes down as its updater asked for, and `slot` comes up."""
    assert host.goes_down() == "reboot"
    assert host.end_updater(signal.SIGTERM) == 0
    host.machine.power_on(slot, by)
    host.start_updater()


def test_update_by_reboot_then_a_cold_boot_that_was_ordered_then_the_way_back(
    system_host: SystemHost,
) -> None:
    host, api = system_host, system_host.hall.server.api
    made = host.update_os("lab-1.1.0", "reboot")
    host.goes_down()
    assert host.machine.boot.state().once == "b"
    assert host.machine.records()["b"].state == "trial"

    def is_told() -> bool:
        return bool(host.system()["updates"][0]["phase"] == "trial")

    lab.wait_for(is_told, "a word of the trial", READY_S, host.said)
    boots(host, "b")
    row = host.ended(made["id"])
    assert (row["state"], row["outcome"], row["code"]) == ("confirmed", "confirmed", ""), row
    assert host.machine.boot.state().order == ("b", "a")
    record = host.machine.records()["b"]
    assert (record.state, record.booted_by, record.cold_boot_seen) == ("good", "firmware", True)
    lab.wait_for(lambda: host.system()["running"] == "b", "a report of the new slot", READY_S, host.said)

    at = time.time() + 3.0
    ordered = api.post(f"/nodes/{host.node.id}/cold-boot", {"at": at})
    host.look()
    while not (down := host.machine.down) and time.time() < at:
        time.sleep(0.05)
    assert not down or time.time() >= at, "it is not time yet"
    boots(host, "b")
    lab.wait_for(lambda: host.system()["cold_boot"] is None, "an end of the cold boot", READY_S, host.said)
    last = host.begins()[-1]
    assert (last.cause, last.generation, last.version) == ("cold-boot", ordered["generation"], "1.1.0")
    assert host.finished(last.tx)["state"] == "confirmed"

    status, back = host.call("POST", "/v1/rollback", {"line": "os"})
    assert (status, back["version"]) == (202, "1.0.0"), back
    boots(host, "a")
    tx = host.begins()[-1].tx
    assert (host.begins()[-1].cause, host.finished(tx)["state"]) == ("rollback", "confirmed")
    assert host.machine.boot.state().order == ("a", "b")
    for _ in range(2):  # neither the wish nor the order comes back
        host.look()
        time.sleep(0.5)
    assert [begin.cause for begin in host.begins()] == ["wish", "cold-boot", "rollback"]
    assert host.machine.down == ""


def test_system_that_is_not_the_one_that_came_up_is_given_up_and_the_server_hears_why(
    system_host: SystemHost,
) -> None:
    host = system_host
    made = host.update_os("lab-1.1.0", "reboot")
    boots(host, "a")  # the firmware fell back
    row = host.ended(made["id"])
    assert (row["state"], row["code"], row["outcome"]) == ("reverted", "fell-back", "reverted"), row
    assert host.machine.records()["b"].state == "bad"


def test_kexec_that_this_kernel_denies_becomes_a_reboot(system_host: SystemHost) -> None:
    """The kernel's own word, by the one-shot child: nothing here is a kernel."""
    host = system_host
    made = host.update_os("lab-1.1.0", "kexec")
    boots(host, "b")
    assert host.ended(made["id"])["state"] == "confirmed"
    reasons = [change["reason"] for change in host.transactions()[0]["changes"]]
    assert any("rebooting in its place" in reason for reason in reasons), reasons


def test_updater_that_is_killed_while_it_writes_goes_on(hall: Hall, folder: Path) -> None:
    host = SystemHost(hall, folder, rate=250_000)  # 4 s for its second half
    try:
        host.start()
        host.connected()
        made = host.update_os("lab-1.2.0", "none")

        def half() -> bool:
            update = host.call("GET", "/v1/system")[1]["update"]
            return bool(update and update["done"] > 900_000)

        lab.wait_for(half, "half of the image", READY_S, host.said, every_s=0.05)
        host.end_updater(signal.SIGKILL)
        assert host.machine.records()["b"].state == "writing"
        assert not host.machine.boot.kernel("b").exists(), "half a system must not be bootable"
        host.start_updater()
        row = host.ended(made["id"])
        assert row["state"] == "confirmed", row
        assert len(host.begins()) == 1
        assert host.machine.slot_data("b").startswith(hall.images["1.2.0"].root)
    finally:
        host.close()


def test_update_that_is_cancelled_meanwhile_takes_no_machine_down(hall: Hall, folder: Path) -> None:
    host = SystemHost(hall, folder, rate=100_000)  # 15 s: it is cancelled long before
    try:
        host.start()
        host.connected()
        host.update_os("lab-1.2.0", "reboot")
        lab.wait_for(lambda: (host.system()["update"] or {}).get("done"), "first bytes", READY_S, host.said)
        hall.server.api.delete(f"/nodes/{host.node.id}/update-os")
        done = host.finished(host.begins()[0].tx)
        assert (done["state"], done["reason"]["code"]) == ("reverted", "superseded")
        assert host.machine.down == ""
        assert host.machine.boot.state().once == ""
    finally:
        host.close()


def test_bytes_may_come_from_another_place_of_which_nothing_is_believed(hall: Hall, folder: Path) -> None:
    host = SystemHost(hall, folder)
    try:
        host.start()
        image = hall.images["1.1.0"]
        host_, port = hall.server.gateway()
        signed = f"https://{host_}:{port}/v1/targets/os/{image.built.sha256}.lab-1.1.0.bundle"
        status, said = host.call("POST", "/v1/update-os", {"bundle": signed, "activation": "none"})
        assert (status, said["error"]["code"]) == (404, "not-found"), "the name in the URL is what is signed"
        with Elsewhere(hall, image.bundle) as place:
            asked = {"bundle": f"https://127.0.0.1:{place.port}/x/lab-1.1.0.bundle", "activation": "none"}
            status, made = host.call("POST", "/v1/update-os", asked)
            assert status == 202, made
            done = host.finished(made["tx"])
        assert done["state"] == "confirmed", done
        assert host.machine.slot_data("b").startswith(image.root)
        assert place.requests, "it was not asked at all"
        assert place.shown == {None}, "the node's certificate is for its server to see"
        with Elsewhere(hall, hall.images["1.2.0"].bundle) as place:  # another bundle under the same name
            asked = {"bundle": f"https://127.0.0.1:{place.port}/x/lab-1.1.0.bundle", "activation": "none"}
            host.machine.records_file.unlink()  # else the slot holds it already
            made = host.call("POST", "/v1/update-os", asked)[1]
            done = host.finished(made["tx"])
        assert (done["state"], done["reason"]["code"]) == ("reverted", "altered-bundle"), done
    finally:
        host.close()


def test_slots_that_are_not_there_are_told_and_found_once_they_are(hall: Hall, folder: Path) -> None:
    host = SystemHost(hall, folder)
    disk = host.machine.disk
    try:
        aside = disk.rename(disk.with_name("aside"))
        host.start()
        error = lab.wait_for(lambda: host.system()["error"], "a word about the slots", READY_S, host.said)
        assert (error["code"], str(disk) in error["text"]) == ("disk-failed", True)
        assert host.system()["slots"] == {}
        with pytest.raises(ServerRefused, match=r"no-slots|disk-failed"):
            host.update_os("lab-1.1.0", "none")
        aside.rename(disk)
        lab.wait_for(lambda: host.system()["running"] == "a", "slots again", READY_S, host.said)
        assert host.system()["error"] is None
        assert host.ended(host.update_os("lab-1.1.0", "none")["id"])["state"] == "confirmed"
    finally:
        host.close()


def test_none_first_and_then_reboot_writes_the_slot_once(system_host: SystemHost) -> None:
    host = system_host
    first = host.update_os("lab-1.1.0", "none")
    host.ended(first["id"])
    second = host.update_os("lab-1.1.0", "reboot")
    assert second["generation"] > first["generation"]
    boots(host, "b")
    row = host.ended(second["id"])
    assert row["state"] == "confirmed", row
    assert row["fetched"] < 100_000, "the slot held it already"
