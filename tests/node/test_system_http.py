"""POST /v1/update-os and GET /v1/system of a node's updater: a real process, a real server behind it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from typer.testing import CliRunner, Result

from instar.updater.http import openapi
from instar_lab import machine as lab
from instar_server.ctl.main import app
from tests.node.system_host import READY_S, Hall, SystemHost
from tests.node.updater_host import free_port

GOOD = {"bundle": "lab-1.1.0", "activation": "none"}


@pytest.fixture(scope="module")
def host(hall: Hall) -> Iterator[SystemHost]:
    """One for all that is refused: it must come to no harm by it."""
    folder = Path(tempfile.mkdtemp(prefix="is-", dir="/tmp"))
    made = SystemHost(hall, folder, more='min_bundle_version = "1.0.0"\n')
    try:
        made.start()
        yield made
    finally:
        made.close()
        lab.end_all_naming(folder, grace_s=0.5)
        shutil.rmtree(folder, ignore_errors=True)


def holds(body: Any, schema: str) -> None:
    document = openapi.document("1.0.0")
    whole = {**document, "$ref": f"#/components/schemas/{schema}"}
    jsonschema_rs.validator_for(whole).validate(body)


def on_disk(host: SystemHost) -> dict[str, Any]:
    """All that an update may write, without the clock's."""
    machine = host.machine
    esp = {
        str(path.relative_to(machine.esp)): path.read_bytes()
        for path in machine.esp.rglob("*")
        if path.is_file()
    }
    variables = {path.name: path.read_bytes() for path in machine.efivars.iterdir()}
    journals = sorted(path.name for path in host.layout.journal.glob("*.journal"))
    return {
        "disk": machine.disk.read_bytes(), "esp": esp, "variables": variables, "journals": journals,
        "records": machine.records(), "orders": host.layout.orders.exists(),
    }  # fmt: skip


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    (
        {"bundle": "lab-1.1.0"},
        400,
        "invalid-argument",
        "expected activation none, reboot, kexec, got nothing",
    ),
    ({"bundle": "lab-1.1.0", "activation": ""}, 400, "invalid-argument", "got ''"),
    ({"bundle": "lab-1.1.0", "activation": "later"}, 400, "invalid-argument", "got 'later'"),
    ({"activation": "none"}, 400, "invalid-argument", "got nothing"),
    ({**GOOD, "target": "os/lab-1.1.0.bundle"}, 400, "invalid-argument", "got both"),
    ({**GOOD, "bundle": "lab"}, 400, "invalid-argument", "expected a bundle as"),
    ({**GOOD, "bundle": "../lab-1.1.0"}, 400, "invalid-argument", "expected a bundle as"),
    ({**GOOD, "bundle": "node/instar-1.0.0.tar.gz"}, 400, "invalid-argument", "expected a bundle as"),
    ({**GOOD, "bundle": "http://x/lab-1.1.0.bundle"}, 400, "invalid-argument", "https://"),
    ({**GOOD, "bundle": 7}, 400, "invalid-argument", "got 7"),
    ({**GOOD, "override_cold_boot": "yes"}, 400, "invalid-argument", "true or false"),
    ({**GOOD, "more": 1}, 400, "bad-request", "'more'"),
    ({**GOOD, "bundle": "lab-7.0.0"}, 404, "not-found", "os/lab-7.0.0.bundle"),
    ({**GOOD, "bundle": "lab-9.0.0"}, 412, "failed-precondition", "wrong-hardware"),
]


@pytest.mark.parametrize(("body", "status", "code", "words"), REFUSED)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    host: SystemHost, body: dict[str, Any], status: int, code: str, words: str
) -> None:
    before = on_disk(host)
    got, said = host.call("POST", "/v1/update-os", body)
    assert (got, said["error"]["code"]) == (status, code), said
    assert words in said["error"]["message"]
    holds(said, "Error")
    assert on_disk(host) == before


def test_server_that_is_away_makes_it_unavailable(hall: Hall, folder: Path) -> None:
    host = SystemHost(hall, folder)
    node = json.loads(host.layout.node.read_bytes())
    host.layout.node.write_text(json.dumps({**node, "server": "https://127.0.0.1:9"}))
    try:
        host.start_updater()
        before = on_disk(host)
        status, said = host.call("POST", "/v1/update-os", GOOD)
        assert (status, said["error"]["code"]) == (503, "unavailable"), said
        assert on_disk(host) == before
    finally:
        host.close()


def test_second_one_is_aborted_and_changes_nothing(hall: Hall, folder: Path) -> None:
    host = SystemHost(hall, folder, rate=40_000)  # 7 s: the others come long before its end
    try:
        host.start()
        status, first = host.call("POST", "/v1/update-os", GOOD)
        assert status == 202, first
        holds(first, "Ordered")
        for body in (GOOD, {"bundle": "lab-1.2.0", "activation": "reboot"}):
            status, said = host.call("POST", "/v1/update-os", body)
            assert (status, said["error"]["code"]) == (409, "aborted"), said
            assert first["tx"] in said["error"]["message"]
        status, shown = host.call("GET", f"/v1/transactions/{first['tx']}")
        holds(shown, "Transaction")
        done = host.finished(first["tx"])
        assert (done["state"], done["cause"], done["version"]) == ("confirmed", "push", "1.1.0"), done
        assert [begin.tx for begin in host.begins()] == [first["tx"]]
        assert host.machine.slot_data("b").startswith(hall.images["1.1.0"].root)
        status, shown = host.call("GET", "/v1/system")
        holds(shown, "System")
        assert (shown["slots"]["b"]["state"], shown["update"], shown["error"]) == ("installed", None, None)
    finally:
        host.close()


def test_bundle_that_cannot_be_fetched_now_waits_says_why_and_lets_no_second_in(
    hall: Hall, folder: Path
) -> None:
    host = SystemHost(hall, folder)
    try:
        host.start()
        asked = {"bundle": "https://127.0.0.1:9/lab-1.1.0.bundle", "activation": "none"}
        status, first = host.call("POST", "/v1/update-os", asked)
        assert status == 202, first

        def why() -> str:
            return " ".join(change["reason"] for each in host.transactions() for change in each["changes"])

        lab.wait_for(lambda: "cannot reach https://127.0.0.1:9" in why(), "a reason", READY_S, host.said)
        for _ in range(20):  # also right between two tries
            status, said = host.call("POST", "/v1/update-os", GOOD)
            assert (status, said["error"]["code"]) == (409, "aborted"), said
            time.sleep(0.05)
        assert [begin.tx for begin in host.begins()] == [first["tx"]]
        assert not any(host.machine.slot_data("b")), "nothing is written before the manifest is known"
    finally:
        host.close()


def test_operator_updates_a_system_by_instarctl(hall: Hall, folder: Path) -> None:
    port = free_port()
    host = SystemHost(hall, folder, rate=500_000, api=f"127.0.0.1:{port}")
    access = hall.server.access
    env = {
        "INSTARCTL_SERVER": access.server, "INSTARCTL_TOKEN": access.token, "INSTARCTL_CA": access.ca,
        "INSTARCTL_CONFIG": str(folder / "none"), "COLUMNS": "200", "TERM": "dumb",
    }  # fmt: skip

    def said(*words: str) -> Result:
        return CliRunner().invoke(app, list(words), env=env)

    def updater(verb: str, *words: str) -> Result:
        where = ("--node", host.node.id, "--address", f"127.0.0.1:{port}", "--operator", str(folder / "ada"))
        return said("updater", verb, *words, *where)

    try:
        host.start()
        assert said("operator", "issue", "ada", "--out", str(folder / "ada")).exit_code == 0
        done = updater("update-os", "--bundle", "lab-1.1.0")
        assert (done.exit_code, "invalid-argument" in done.output) == (6, True), done.output
        done = updater("update-os", "--bundle", "lab-9.0.0", "--activation", "none", "--wait")
        assert (done.exit_code, "failed-precondition" in done.output) == (6, True), done.output
        done = updater(
            "update-os", "--bundle", "lab-1.1.0", "--activation", "none", "--wait", "--within", "3m"
        )
        assert done.exit_code == 0, done.output + host.said()
        assert "system 1.1.0" in done.output
        assert "lies in the other slot" in done.output
        done = updater(
            "update-os", "--bundle", "lab-1.0.0", "--activation", "reboot", "--wait", "--within", "3m"
        )
        assert done.exit_code == 1, done.output
        assert "unavailable: already-running" in done.output
        done = updater("system")
        assert done.exit_code == 0, done.output
        for words in ("slot a", "1.1.0", "installed", "board other-board x86_64"):
            assert words in done.output, done.output
    finally:
        host.close()


def test_rollback_by_hand_needs_a_whole_system_beside_the_one_that_runs(host: SystemHost) -> None:
    before = on_disk(host)
    status, said = host.call("POST", "/v1/rollback", {"line": "os"})
    assert (status, said["error"]["code"]) == (409, "nothing-to-roll-back-to"), said
    assert on_disk(host) == before


def test_status_on_the_node_shows_both_slots(host: SystemHost) -> None:
    status, shown = host.call("GET", "/v1/system")
    holds(shown, "System")
    assert (status, shown["running"], shown["hardware"]) == (200, "a", ["board", "other-board"])
    text = host.node.cli("status")
    assert "slot a   1.0.0" in text
    assert "slot b" in text
    answer = json.loads(host.node.cli("status", "--json"))["system"]
    assert answer["order"] == [] or answer["fault"], "the real machine has no such entries"


def test_node_without_slots_says_so_and_has_nothing_of_it_in_memory(hall: Hall, folder: Path) -> None:
    host = SystemHost(hall, folder)
    text = host.layout.config.read_text().replace("disk =", "# disk =")
    host.layout.config.write_text(text)
    probe = (
        "import sys; from instar.updater import main, loop, api, reporter, targets;"
        "print([n for n in sys.modules if n.startswith(('instar.host.boot', 'instar.targets.slots', "
        "'instar.updater.s', 'instar.targets.os_slot')) or n == 'ctypes'])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    try:
        host.start_updater()
        status, shown = host.call("GET", "/v1/system")
        holds(shown, "System")
        assert (status, shown["slots"], shown["error"]["code"]) == (200, {}, "no-slots")
        status, said = host.call("POST", "/v1/update-os", GOOD)
        assert (status, said["error"]["code"]) == (412, "failed-precondition"), said
        assert "os.disk" in said["error"]["message"]
        assert said["error"]["message"].count("cannot update the system") == 1
        assert said["error"]["message"].startswith(
            "cannot update the system: no-slots: this node has no slots"
        )
    finally:
        host.close()
