"""Bytes that nobody should send or find: on the disk, on the wire in both directions, on the local sockets."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import time
from pathlib import Path
from typing import Any

from instar.core.errors import InstarError
from instar.wire.messages import MAX_FRAME
from instar_lab import machine
from tests.e2e.conftest import LINES, NEW, Stage, health, log_has, look, said, settings, settled, updates
from tests.e2e.mirror import Answer, Hostile, Request, text_frame
from tests.e2e.strangers import STRANGE, Stranger, held, mutated, samples

MIB = 1024 * 1024
WARM = 16  # descriptors of the fork server and the runners that are kept ready for a while after a job
ROUNDS = 1000


# --- on the disk


def test_a_journal_with_a_bad_record_and_one_with_a_torn_tail(stage: Stage) -> None:
    node = stage.node()
    stage.want(NEW, ("updater",))
    updates(node, NEW, ("updater",))
    node.cli("rollback", "--line", "updater")
    settled(node, 2)
    node.cli("stop")
    first, second = sorted(node.layout.journal.glob("*.journal"), key=lambda path: path.stat().st_mtime)
    whole = second.read_bytes()
    bad = bytearray(first.read_bytes())
    bad[len(bad) // 2] ^= 0x10
    first.write_bytes(bad)
    second.write_bytes(whole + b'deadbeef {"v":1,"kind":"int')
    node.cli("start")
    stage.connected(node)
    machine.wait_for(lambda: second.read_bytes() == whole, "the torn tail to be cut", 60.0, node.logs)
    machine.wait_for(lambda: not first.exists(), "the bad journal to be set aside", 60.0, node.logs)
    assert first.with_suffix(".unreadable").read_bytes() == bad
    assert len(node.history()) == 1
    node.cli("quarantine", "--clear", "all")
    stage.want(NEW)
    updates(node, NEW, before=1)


BROKEN: dict[str, tuple[bytes, ...]] = {
    "config.toml": (
        b"[trial]\nhold_s = 0.",
        b"[trial]\nhold_s = -3\n",
        b'[network]\nproxy = "nonsense"\n',
        b"\xff\xfe",
    ),
    "agent/trial.json": (
        b'{"v":1,"tx":"tx-',
        b'{"v":1,"tx":"t","release":"%s","previous":"p","attempts":"x","max_attempts":1,"lease":{}}',
        (
            b'{"v":1,"tx":"t","release":"%s","previous":"p","attempts":0,"max_attempts":3,"lease":'
            b'{"lease_s":"a","cap_s":[],"boot_id":1,"since":null,"spent_s":{}}}'
        ),
        b"[" * 100_000,
    ),
    "updater/trial.json": (
        b"",
        b'{"v":2,"tx":"of a newer version"}',
        (
            b'{"v":1,"tx":"t","release":"%s","previous":"p","attempts":0,"max_attempts":3,"undone":7,'
            b'"lease":{"lease_s":1,"cap_s":2,"boot_id":"","since":0,"spent_s":0}}'
        ),
        b"null",
    ),
    "quarantine.json": (
        b'{"v":1,"entries":{"agent:',
        b'{"v":1,"entries":{"agent:%s":{"version":1,"reason":{"code":"a","text":"b"},"count":"x","since":0,"until":"z"}}}',
        b'{"v":1,"entries":[1]}',
        b"[" * 100_000,
    ),
    "run/agent.json": (
        b'{"pid":',
        b'{"pid":-1,"started":5,"boot_id":"%b","release":"r"}',
        b'{"pid":1e999,"started":5,"boot_id":"%b","release":"r"}',
        b"[" * 100_000,
    ),
    "run/updater.json": (
        b"\0\0\0",
        b'{"pid":0,"started":5,"boot_id":"%b","release":"r"}',
        b'{"pid":99999999999999999999,"started":5,"boot_id":"%b","release":"r"}',
        b"{}",
    ),
    "run/keep.json": (
        b"",
        b'{"pid":-5,"started":5,"boot_id":"%b","release":"r"}',
        b"7",
        b"[" * 100_000,
    ),
    "service.json": (b'{"v":1,"manag', b'{"v":1,"manager":7}', b"[]", b"[" * 100_000),
}


def test_small_files_that_are_broken_stop_nothing(stage: Stage) -> None:
    node = stage.node(start=False)
    release, digest = stage.hall.programs["1.0.0"].release.encode(), stage.hall.programs[NEW].digest.encode()
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    for number in range(4):
        for name, contents in BROKEN.items():
            data = contents[number].replace(b"%b", boot)
            data = data.replace(b"%s", digest if name == "quarantine.json" else release)
            (node.state / name).write_bytes(data)
        node.cli("start")
        stage.connected(node)
        if number < 4:
            log_has(node, "agent", "going on with the defaults")
            log_has(node, "updater", "going on with the defaults")
        assert set(node.digests()) == set(LINES)
        assert said(node, "updater", "status")["version"] == "1.0.0"
        json.loads(node.cli("status", "--json"))
        if number < 3:
            assert node.cli("stop").strip() == "running: nothing", number
            assert node.running() == []
            for role in LINES:
                (node.layout.run / f"{role}.log").unlink()
    node.layout.config.write_text(settings())
    node.cli("stop")
    node.cli("start")
    stage.want(NEW)
    updates(node, NEW)


# --- on the wire, towards the node


def hostile_frames() -> list[bytes]:
    welcome = '{"t":"welcome","v":1,"server":"9.9.9","ping_s":30.0,"health_s":60.0,"new_field":{"a":[1]}}'
    texts: list[str | bytes] = [
        welcome, '{"t":"dance","v":9}', "garbage", '{"t":"job"}', '{"t":"ping","n":"x"}', '{"t":"look","reason":5}',
        '{"t":"job","id":"../../x","module":"selftest"}', '{"t":"job","id":"j-9","module":"no-such-module"}',
        '{"t":"ack","id":"never-heard-of"}', '{"t":"hello"}', welcome, "[" * 5000, '{"t":"ping","t":"pong"}', b"\xff\xfe",
    ]  # fmt: skip
    frames = [text_frame(each) for each in texts if isinstance(each, str)]
    chance = random.Random(4)
    for body in samples("n-0000000000000000").values():
        if body["t"] != "refused":  # that one ends the channel by right
            frames += [text_frame(mutated(body, chance).decode("latin-1")) for _ in range(15)]
    return frames


def test_a_server_that_sends_nonsense(stage: Stage) -> None:
    node, mirror = stage.mirrored()
    pids = {role: node.pid(role) for role in LINES}
    assert pids["agent"]
    memory, descriptors = held(pids["agent"])
    too_long = text_frame(b"x" * (MAX_FRAME + 1))
    rounds = [
        [*hostile_frames()],
        [hostile_frames()[0], too_long, text_frame('{"t":"ping","n":77}')],
        [hostile_frames()[0], text_frame(b"", size=2**62)],
        [b"\x82\x01x", b"\xc1\x00"],  # a binary frame; a reserved bit
        [b"HTTP/1.1 what?\r\n\r\n"],
        [],
    ]

    def rule(request: Request) -> Any:
        if request.path == "/v1/channel" and "rehearsal" not in request.headers.get("instar-program", ""):
            return Hostile(rounds.pop(0)) if rounds else None
        return None

    mirror.rule = rule
    mirror.hang_up()

    def codes() -> set[str]:
        heard = [json.loads(each) for each in list(mirror.heard) if each.startswith(b"{")]
        return {each["code"] for each in heard if each["t"] == "error"}

    def fewer_than(left: int) -> bool:
        with contextlib.suppress(InstarError):
            said(node, "agent", "look")  # no waiting between two tries
        return len(rounds) < left

    named = {"unknown-type", "not-json", "missing-field", "wrong-type", "bad-job-id"}
    while left := len(rounds):
        machine.wait_for(lambda: fewer_than(left), "another round", 60.0, node.logs, every_s=0.3)
        machine.wait_for(lambda: named <= codes(), "a word about each frame", 60.0, lambda: str(codes()))
        if len(rounds) < 5:
            machine.wait_for(lambda: "frame-too-large" in codes(), "the same of the second round", 60.0)
        time.sleep(0.7)
        mirror.hang_up()
    stage.connected(node)
    assert {role: node.pid(role) for role in LINES} == pids
    agent = pids["agent"]
    machine.wait_for(lambda: held(agent)[1] <= descriptors + 3 + WARM, "descriptors given back", 60.0)
    assert held(agent)[0] < memory + 12 * MIB


def test_answers_of_a_newer_or_a_broken_server(stage: Stage) -> None:
    node, mirror = stage.mirrored()
    pids = {role: node.pid(role) for role in LINES}
    answers: list[Any] = [
        {"v": 2, "wishes": []}, {"v": 1}, {"v": 1, "node": 5, "poll_s": "x", "lines": []}, b"", b"\xff", b"[" * 50_000,
        {"v": 1, "node": node.id, "poll_s": 1e400, "lines": {"agent": {"version": "../../x", "target": "/etc", "digest": "q"}}},
        {"v": 1, "node": node.id, "poll_s": -5, "lines": {}}, None, "text", b"{" + b" " * (17 * MIB),
    ]  # fmt: skip
    count = len(answers)
    mirror.rule = lambda request: (
        Answer(200, answers.pop(0)) if request.path == "/v1/node/wanted" and answers else None
    )
    deadline = time.monotonic() + 120
    while answers and time.monotonic() < deadline:
        look(node)
        time.sleep(0.2)
    assert not answers, count
    assert {role: node.pid(role) for role in LINES} == pids

    def newer(request: Request, status: int, body: bytes) -> bytes:
        if status == 200 and request.path.startswith("/v1/node/"):
            return json.dumps({**json.loads(body), "fresh": {"x": [1]}, "other": None}).encode()
        return body

    mirror.change = newer
    stage.want(NEW)
    updates(node, NEW)


# --- on the wire, towards the server


def test_a_node_that_sends_nonsense(stage: Stage) -> None:
    """Mutated frames of every type, frames that are too long, and HTTP that is none, beside a good node."""
    good, bad = stage.node(), stage.node(start=False)
    server, gateway = stage.server.pid, stage.server.gateway()
    place = f"{gateway[0]}:{gateway[1]}"
    since = health(good)["pid"], good.id
    memory, descriptors = held(server)
    slow = Stranger(bad, gateway)
    slow.send(b"GET /v1/node/wanted HTTP/1.1\r\nHo")
    chance = random.Random(20)
    kinds = samples(bad.id)

    def channel() -> Stranger:
        stranger = Stranger(bad, gateway)
        stranger.channel(place)
        stranger.text(json.dumps(kinds["hello"]).encode())
        return stranger

    stranger = channel()
    for number in range(ROUNDS * len(kinds)):
        body = kinds[list(kinds)[number % len(kinds)]]
        if body["t"] == "hello" and number % 3 == 0:  # as the first one
            stranger.close()
            stranger = Stranger(bad, gateway)
            stranger.channel(place)
        if not stranger.text(mutated(body, chance)):
            stranger.close()
            stranger = channel()
    stranger.close()

    # Over the limit by one byte: an error, and the channel stays. Far over it: the channel ends.
    stranger = channel()
    stranger.text(b'{"t":"health","facts":"' + b"x" * MAX_FRAME + b'"}')
    stranger.text(b'{"t":"ping","n":4711}')
    machine.wait_for(
        lambda: b"frame-too-large" in stranger.heard, "an error", 60.0, lambda: repr(stranger.heard)
    )
    machine.wait_for(lambda: b"4711" in stranger.heard, "a pong", 60.0, lambda: repr(stranger.heard))
    stranger.send(bytes((0x81, 0xFF)) + (2**40).to_bytes(8, "big") + b"\0\0\0\0" + b"x" * 65_536)
    machine.wait_for(lambda: stranger.ended, "the channel's end", 60.0)

    for data in _http_garbage():
        each = Stranger(bad, gateway)
        each.send(data)
        each.answered(60.0)
        assert b" 500 " not in each.heard[:60], (data[:80], each.heard[:300])
        each.close()
    for _ in range(50):
        with socket.create_connection(gateway, timeout=60) as raw:
            raw.sendall(random.randbytes(300))

    assert stage.server.pid == server
    assert (health(good)["pid"], good.id) == since
    assert health(good)["connected"]
    assert "refused by the server" not in (good.layout.run / "agent.log").read_text()
    assert (good.layout.run / "agent.log").read_text().count("connected; the server") == 1
    log = stage.server.log.read_text(errors="replace")
    ends = [line for line in log.splitlines() if re.match(r"[\w.]+(Error|Exception|Message|Line)\b", line)]
    assert ends == []  # no fault of ours, and strangers do not fill the log
    stage.want(NEW)
    updates(good, NEW)
    machine.wait_for(lambda: slow.ended, "the slow client's end", 120.0)
    machine.wait_for(lambda: held(server)[1] <= descriptors + 12, "descriptors given back", 60.0)
    assert held(server)[0] < memory + 48 * MIB


def _http_garbage() -> list[bytes]:
    head = b"Host: x\r\n"
    return [
        b"\0" * 200 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /v1/node/wanted HTTP/9.9\r\n" + head + b"\r\n",
        b"GET /v1/node/wanted HTTP/1.1\r\n" + head + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /v1/node/events HTTP/1.1\r\n" + head + b"Content-Length: -5\r\n\r\n",
        b"POST /v1/node/events HTTP/1.1\r\n" + head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/node/events HTTP/1.1\r\n" + head + b"Content-Length: 99999999999\r\n\r\n",
        b'POST /v1/node/events HTTP/1.1\r\n' + head + b"Content-Length: 2\r\n\r\n{}",
        b"POST /v1/node/events HTTP/1.1\r\n" + head + b"Content-Length: 60000\r\n\r\n" + b"[" * 60_000,
        b"POST /v1/enrol HTTP/1.1\r\n" + head + b'Content-Length: 40\r\n\r\n{"v":1,"token":"\xff\xfe","csr":5,"facts":[]}  ',
        b"POST /v1/renew HTTP/1.1\r\n" + head + b'Content-Length: 19\r\n\r\n{"v":1,"csr":"-----"}',
        b"GET /v1/targets/../../../etc/passwd HTTP/1.1\r\n" + head + b"\r\n",
        b"GET /v1/targets/%2e%2e/%2e%2e/server.db HTTP/1.1\r\n" + head + b"\r\n",
        b"GET /v1/targets/node%00 HTTP/1.1\r\n" + head + b"\r\n",
        b"GET /v1/metadata/..%2f..%2fadmin.token HTTP/1.1\r\n" + head + b"\r\n",
        b"GET /v1/node/verdict?line=x&phase=y&tx=%00&digest=z&wait_s=nan HTTP/1.1\r\n" + head + b"\r\n",
        b"GET /v1/node/verdict?line=agent&phase=trial&tx=tx-1&digest=" + b"a" * 96 + b"&wait_s=1e400 HTTP/1.1\r\n" + head + b"\r\n",
        b"GET /v1/node/wanted HTTP/1.1\r\n" + head + b"Instar-Program: \xff \x80 x\r\n\r\n",
        b"GET /v1/channel HTTP/1.1\r\n" + head + b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n\r\n",
        b"DELETE /v1/node/wanted HTTP/1.1\r\n" + head + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]  # fmt: skip


# --- on the local sockets


def speak(path: Path, data: bytes, wait_s: float = 60.0) -> bytes:
    """Send raw bytes and an end to a local socket; what came back until it was closed."""
    heard = b""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(wait_s)
        connection.connect(str(path))
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65_536):
                heard += chunk
        except (BrokenPipeError, ConnectionResetError):
            pass
    return heard


def test_nonsense_on_the_local_sockets(stage: Stage) -> None:
    node = stage.node()
    chance = random.Random(6)
    requests = (
        {"v": 1, "do": "health"},
        {"v": 1, "do": "status"},
        {"v": 1, "do": "rollback", "line": "agent"},
    )
    before = {role: (node.pid(role), held(node.pid(role) or 0)) for role in LINES}
    for role in LINES:
        path = node.layout.socket(role)
        for _ in range(ROUNDS):
            heard = speak(path, mutated(chance.choice(requests), chance) + b"\n")
            for line in heard.splitlines():
                assert isinstance(json.loads(line)["ok"], bool)
        for data in (
            b"x" * 200_000,
            b"\n" * 1000,
            b"[" * 60_000 + b"\n",
            b"\xff\xfe\n",
            b"",
            b"9" * 6000 + b"\n",
        ):
            speak(path, data)
        assert json.loads(speak(path, b'{"v":1,"do":"dance"}\n').splitlines()[0])["ok"] is False
        assert json.loads(speak(path, b'{"v":1,"do":"status","new":1}\n').splitlines()[0])["ok"] is True
    for role, (pid, (memory, descriptors)) in before.items():
        assert node.pid(role) == pid
        machine.wait_for(
            lambda pid=pid, most=descriptors + 2: held(pid)[1] <= most, "descriptors given back", 60.0
        )
        assert held(pid)[0] < memory + 8 * MIB
    for value in STRANGE:  # values of the one argument that there is
        with_line = json.dumps({"v": 1, "do": "rollback", "line": value}).encode() + b"\n"
        assert json.loads(speak(node.layout.socket("updater"), with_line))["ok"] is False


def test_clients_that_dawdle_do_not_lock_others_out(stage: Stage) -> None:
    node = stage.node()
    for role in LINES:
        path = str(node.layout.socket(role))
        sitting = []
        for _ in range(2):  # the updater serves one at a time, each for 5 s at most
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
            connection.sendall(b'{"v":1,')
            sitting.append(connection)
        end = time.monotonic() + 180
        answered = 0.0
        while not answered and time.monotonic() < end:
            for each in sitting:  # a byte now and then
                try:
                    each.sendall(b" ")
                except OSError:
                    continue
            try:
                assert said(node, role, "health")["pid"] == node.pid(role)
                answered = time.monotonic()
            except InstarError:  # not yet
                continue
        assert answered, role
        for each in sitting:
            each.close()
    assert health(node)["connected"]
