"""Requirements D1, D6, D7 and D8: a real node's updater, driven over TLS by an operator's certificate."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from instar_lab import machine
from instar_lab.node import Node
from instar_lab.program import build, variants
from instar_server.ctl.main import app
from instar_server.trust.pack import pack_release
from tests.e2e.conftest import NEW, OLD, Stage, cli, code_of, health, settings

BAD, LARGE = "1.7.0", "1.8.0"
MIB = 1 << 20
GONE = "n-0000000000000000"


class Desk:
    """An operator at work: a node with its API open, a certificate, parcels."""

    def __init__(self, stage: Stage, hold_s: float = 0.3) -> None:
        self.stage, self.folder = stage, stage.folder / "desk"
        self.folder.mkdir()
        self.port = machine.free_port()
        self.node = stage.node(settings(more=f'api = "127.0.0.1:{self.port}"\n', hold_s=hold_s))
        assert self.said("operator", "issue", "ada", "--out", str(self.folder / "ada")).exit_code == 0

    def said(self, *words: str) -> Result:
        access = self.stage.server.access
        env = {
            "INSTARCTL_SERVER": access.server, "INSTARCTL_TOKEN": access.token, "INSTARCTL_CA": access.ca,
            "INSTARCTL_CONFIG": str(self.folder / "none"), "COLUMNS": "200", "TERM": "dumb",
        }  # fmt: skip
        return CliRunner().invoke(app, list(words), env=env)

    def updater(self, verb: str, *words: str, node: str = "", operator: str = "ada") -> Result:
        where = ("--address", f"127.0.0.1:{self.port}", "--node", node or self.node.id)
        return self.said("updater", verb, *words, *where, "--operator", str(self.folder / operator))

    def data(self, verb: str, *words: str) -> Any:
        done = self.updater(verb, *words, "--json")
        assert done.exit_code == 0, done.output + self.node.logs(30)
        return json.loads(done.stdout)

    def parcel(self, version: str) -> Path:
        path = self.folder / f"{version}.parcel"
        if not path.exists():
            done = self.said("release", "parcel", version, "--out", str(path))
            assert done.exit_code == 0, done.output
        return path

    def left_over(self) -> list[str]:
        incoming, staging = self.node.layout.incoming, self.node.layout.staging
        return [path.name for folder in (incoming, staging) if folder.is_dir() for path in folder.iterdir()]


@pytest.fixture
def desk(stage: Stage) -> Desk:
    return Desk(stage)


def test_both_lines_are_pushed_and_rolled_back(desk: Desk) -> None:
    parcel = str(desk.parcel(NEW))
    digest = desk.stage.hall.releases[NEW].digest
    pid = desk.data("health")["pid"]

    pushed = desk.updater("push", parcel)
    assert pushed.exit_code == 0, pushed.output + desk.node.logs(30)
    assert re.search(rf"agent runs {NEW}", pushed.stdout)
    assert f"agent {NEW}: watching" in pushed.stderr or f"agent {NEW}: confirmed" in pushed.stderr, (
        pushed.stderr
    )
    assert health(desk.node)["digest"] == digest

    pushed = desk.updater("push", parcel, "--line", "updater")
    assert pushed.exit_code == 0, pushed.output + desk.node.logs(30)
    found = desk.data("health")
    assert (found["version"], found["digest"], found["pid"]) == (NEW, digest, pid), (
        "the same process, other code"
    )
    assert {line: hold["version"] for line, hold in found["held"].items()} == {"agent": NEW, "updater": NEW}

    listed = desk.data("transactions")["transactions"]
    assert [(t["line"], t["cause"], t["via"], t["state"]) for t in listed] == [
        ("updater", "push", "push", "confirmed"), ("agent", "push", "push", "confirmed"),
    ]  # fmt: skip
    again = desk.updater("push", parcel)
    assert (again.exit_code, "already-current" in again.stderr) == (6, True)

    for line in ("agent", "updater"):
        back = desk.updater("rollback", "--line", line)
        assert back.exit_code == 0, back.output + desk.node.logs(30)
        assert f"{line} runs {OLD}" in back.stdout
    assert health(desk.node)["version"] == OLD
    assert desk.data("health")["version"] == OLD
    lines = desk.data("releases")["lines"]
    for line in ("agent", "updater"):
        current = next(r for r in lines[line]["releases"] if r["current"])
        assert (current["version"], current["valid"]) == (OLD, True)


def test_a_node_pushes_to_itself(desk: Desk) -> None:
    done = cli(desk.node, "push", str(desk.parcel(NEW)))
    assert done.returncode == 0, done.stderr + desk.node.logs(30)
    assert f"agent runs {NEW}" in done.stdout
    (entry,) = desk.node.history()
    assert (entry["cause"], entry["state"]) == ("push", "confirmed")
    assert code_of(cli(desk.node, "push", str(desk.parcel(NEW)), "--json")) == "already-current"
    assert code_of(cli(desk.node, "push", str(desk.folder / "none"), "--json")) == "no-file"
    assert code_of(cli(desk.node, "push", str(desk.folder / "ada" / "cert.pem"), "--json")) == "bad-parcel"


def test_a_push_that_waits_for_the_server_says_so(desk: Desk) -> None:
    parcel, server = str(desk.parcel(NEW)), desk.stage.hall.server
    server.stop()
    try:
        here = cli(desk.node, "push", parcel, "--wait", "8")
        (entry,) = desk.node.history()
        began = time.monotonic()
        far = desk.updater("watch", entry["tx"], "--wait", "2s")
        took_s = time.monotonic() - began
        shown = desk.node.cli("history")
    finally:
        server.start()
    assert here.returncode == 4
    assert "still-under-way" in here.stderr
    assert "still-under-way" in far.stderr
    assert took_s < 9.5, "the updater says something every 10 s only"
    for words in (here.stderr, far.stderr, shown):
        assert "cannot reach https://" in words, words
    done = desk.updater("watch", entry["tx"])
    assert (done.exit_code, f"agent runs {NEW}" in done.stdout) == (0, True), done.output


def test_a_release_that_does_not_stay_up_goes_back_with_both_probes(stage: Stage) -> None:
    desk, hall = Desk(stage, hold_s=3.0), stage.hall
    hall.releases[BAD] = hall.server.publish(variants.variant("crashes-once-activated", BAD))
    before = health(desk.node)["digest"]
    done = desk.updater("push", str(desk.parcel(BAD)))
    assert done.exit_code == 7, done.output + desk.node.logs(40)
    assert "agent went back to 1.0.0" in done.stderr
    assert f"probe of the candidate release {BAD}-" in done.stderr, done.stderr
    assert re.search(rf"probe of the restored release {OLD}-\w+: answered", done.stderr), done.stderr
    machine.wait_for(lambda: health(desk.node).get("digest") == before, "the old agent", 60.0, desk.node.logs)
    (entry,) = desk.data("transactions")["transactions"]
    assert entry["state"] == "reverted"
    assert entry["probes"]["restored"]["ok"] is True
    shown = cli(desk.node, "push", str(desk.parcel(BAD)), "--wait", "60")  # an operator may insist
    assert shown.returncode != 0


def altered(parcel: Path, into: Path) -> Path:
    """The same with one byte of the archive changed, and its own record made to fit."""
    with tarfile.open(parcel) as old, tarfile.open(into, "w", format=tarfile.USTAR_FORMAT) as new:
        files = {member.name: old.extractfile(member).read() for member in old}  # type: ignore[union-attr]
        archive = bytearray(files["archive"])
        archive[len(archive) // 2] ^= 1
        record = json.loads(files["parcel.json"]) | {"sha256": hashlib.sha256(archive).hexdigest()}
        files |= {"parcel.json": json.dumps(record).encode(), "archive": bytes(archive)}
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    return into


def test_a_parcel_that_was_altered_changes_nothing(desk: Desk) -> None:
    done = desk.updater("push", str(altered(desk.parcel(NEW), desk.folder / "altered.parcel")))
    assert (done.exit_code, "altered-" in done.stderr) == (7, True), done.output
    assert health(desk.node)["version"] == OLD
    assert desk.data("health")["transaction"] == ""
    assert not [name for name in desk.left_over() if name.startswith("tx-")]


def test_who_else_is_at_work_is_said(desk: Desk) -> None:
    parcel = desk.parcel(NEW)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as first:
        first.connect(str(desk.node.layout.socket("updater")))
        head = f"POST /v1/push HTTP/1.1\r\nHost: x\r\nContent-Length: {parcel.stat().st_size}\r\n"
        first.sendall(f"{head}Instar-SHA384: {'0' * 96}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert b"100 Continue" in first.recv(100)
        busy = desk.updater("push", str(parcel), "--line", "updater")
        tx = desk.data("health")["receiving"]["tx"]
        assert (busy.exit_code, f"transaction {tx} is under way" in busy.stderr) == (6, True), busy.output
        first.sendall(parcel.read_bytes())
        assert b"altered-parcel" in first.recv(1000)
    assert desk.left_over() == []


def test_nobody_else_is_spoken_to(desk: Desk) -> None:
    done = desk.updater("health", node=GONE)
    assert (done.exit_code, "not-this-node" in done.stderr) == (3, True)
    with socket.socket() as deaf:  # nobody else may listen here
        deaf.bind(("127.0.0.1", 0))
        nobody = desk.said("updater", "health", "--node", GONE, "--address", f"127.0.0.1:{deaf.getsockname()[1]}",
                           "--operator", str(desk.folder / "ada"))  # fmt: skip
    assert (nobody.exit_code, "unreachable" in nobody.stderr) == (5, True)
    layout = desk.node.layout
    its_own = ["--cert", str(layout.certificate), "--key", str(layout.key), "--ca", str(layout.ca)]
    where = ["--address", f"127.0.0.1:{desk.port}", "--node", desk.node.id]
    refused = desk.said("updater", "health", *where, *its_own)
    assert (refused.exit_code, "not-an-operator" in refused.stderr) == (6, True)
    assert desk.said("updater", "health", *where).exit_code == 2


@pytest.mark.slow
def test_a_signed_release_of_200_mb_takes_no_memory_of_the_updater(desk: Desk) -> None:
    """The whole way: push, verification, unpacking, rehearsal, switch, watch."""
    program = build.build(LARGE)
    file = io.BytesIO(program.data)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("filler", os.urandom(200 * 1000 * 1000))
    desk.stage.server.publish_release(pack_release(file.getvalue(), LARGE, level=1))
    parcel = desk.parcel(LARGE)
    assert parcel.stat().st_size > 200 * 1000 * 1000
    desk.data("health")
    before = peak(desk.node)
    done = desk.updater("push", str(parcel))
    assert done.exit_code == 0, done.output + desk.node.logs(40)
    grown = peak(desk.node) - before
    print(f"peak {before / MIB:.1f} MiB before, {grown / MIB:.2f} MiB more after")
    assert grown < 8 * MIB


def peak(node: Node) -> int:
    text = Path(f"/proc/{node.pid('updater')}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
