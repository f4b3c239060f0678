"""Recovery: a real agent has a core verified, starts it, forwards its words; the core is a small one of ours."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instar.agent.recovery import Recovery
from instar.core.errors import TrustError
from instar.host import rescue
from instar.host.clock import Clock
from instar.host.incoming import Incoming
from instar.host.locks import RoleLock
from instar.wire.messages import (
    AgentUpdateDownloaded,
    AgentUpdateEnded,
    AgentUpdateProgress,
    Error,
    Message,
    Ping,
    Pong,
)
from instar_server.trust import offline
from instar_server.trust.pack import Release
from tests.agent.fleet import Place, Server
from tests.agent.sending import transfer
from tests.agent.spawning import is_gone, until_gone
from tests.agent.ward import ARCHIVE, CORE, CORE_SHA384, GOOD, ORDER, TARGET, WHOLE, Ward, signed, zipapp
from tests.node.parcels import DIGEST, offer, parcel
from tests.trust.world import World, days, now


async def test_a_core_runs_and_its_words_come(ward: Ward, tmp_path: Path) -> None:
    ward.act(
        says=[
            {"progress": {"phase": "fetch", "percent": 0, "text": "from the server"}},
            "no JSON",
            '{"progress": 7}',
            {"progress": {"phase": "fetch", "percent": 100.0}},
            {"downloaded": "cd" * 48},
            {"downloaded": "short"},
            {"progress": {"phase": "install", "percent": 1e9}},
        ],
        ended=GOOD,
    )
    await ward.connection.send(ORDER)
    assert await ward.words() == [
        AgentUpdateProgress("r-1", "verify"),
        AgentUpdateProgress("r-1", "start"),
        AgentUpdateProgress("r-1", "fetch", 0.0, "from the server"),
        AgentUpdateProgress("r-1", "fetch", 100.0),
        AgentUpdateDownloaded("r-1", "cd" * 48),
        AgentUpdateProgress("r-1", "install", -1.0),
        AgentUpdateProgress("r-1", "late", 1.0),
        AgentUpdateEnded("r-1", True, "", "all lines done"),
    ]
    said = await ward.core()
    assert said["argv"] == [
        "--state",
        str(ward.state),
        "--order",
        str(ward.state / "run/recovery/order.json"),
    ]
    assert (said["flags"], said["cwd"], said["sid"]) == ([1, 1], "/", said["pid"])
    assert len(said["fds"]) <= 6, said["fds"]  # 0, 1, 2, the program, the listing, and what it writes
    assert set(said["environ"]) <= {"PATH", "LANG", "LC_CTYPE"}
    order = said["order"]
    certificate = (
        (tmp_path / "server.pem").read_text().partition("-----BEGIN EC")[0].partition("-----BEGIN PRIV")[0]
    )
    assert order.pop("pin") == hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()
    server = json.loads(ward.place.layout.node.read_text())["server"]
    assert order == {
        "v": 1, "id": "r-1", "url": ORDER.url, "sha384": ORDER.sha384, "version": "1.1.0", "digest": DIGEST,
        "target": ORDER.target, "lines": ["agent"], "server": server,
    }  # fmt: skip
    asked = json.loads((ward.state / "asked.json").read_text())
    kept = ward.place.layout.incoming / CORE_SHA384[:24]
    assert asked == [
        "verify",
        "--state",
        str(ward.state),
        "--target",
        TARGET,
        "--from",
        str(kept / "metadata"),
    ]


async def test_the_channel_goes_on_and_one_runs_at_a_time(ward: Ward) -> None:
    ward.act(hold=True, ended=GOOD)
    await ward.connection.send(ORDER)
    await ward.core()
    await ward.connection.send(ORDER)  # the same again: nothing
    await ward.connection.send(replace(ORDER, id="r-2"))
    await ward.connection.send(Ping(7))
    said = await ward.words()
    assert [(m.id, m.code) for m in said if isinstance(m, AgentUpdateEnded)] == [("r-2", "busy")]
    while (await ward.connection.expect(Pong)).n != 7:
        pass
    ward.go()
    ended = (await ward.words())[-1]
    assert (ended.id, ended.ok) == ("r-1", True)  # type: ignore[union-attr]
    assert (await ward.recover(replace(ORDER, id="r-3"))).ok


@pytest.mark.parametrize(
    ("act", "code", "words"),
    [({"exit": 3, "stderr": "Traceback: it fell"}, "core-failed", "ended with status 3\nTraceback: it fell"),
     ({"exit": 5, "ended": {"ok": False, "code": "bad-hash", "text": "three bad ones"}, "stderr": "x"}, "bad-hash", "three bad ones\nx"),
     ({"exit": 1, "ended": GOOD}, "core-failed", "ended with status 1"),
     ({"exit": 0}, "core-failed", "ended with status 0")],
)  # fmt: skip
async def test_a_core_that_fails(ward: Ward, act: dict[str, Any], code: str, words: str) -> None:
    ward.act(**act)
    ended = await ward.recover()
    assert (ended.ok, ended.code) == (False, code)
    assert ended.text.endswith(words), ended.text


async def test_a_core_that_floods_and_is_killed(ward: Ward) -> None:
    flood = "x" * 200_000
    ward.act(
        says=[flood, flood, {"progress": {"phase": "p" * 1000, "percent": 5, "text": "t" * 9000}}],
        stderr=flood,
    )
    await ward.connection.send(ORDER)
    said = await ward.words()
    longest = next(m for m in said if isinstance(m, AgentUpdateProgress) and m.percent == 5)
    assert (len(longest.phase), len(longest.text)) == (64, 300)
    assert len(said[-1].text) < 1200  # type: ignore[union-attr]
    ward.act(sleep_s=60)
    (ward.state / "core.said").unlink()
    await ward.connection.send(replace(ORDER, id="r-2"))
    os.kill((await ward.core())["pid"], signal.SIGKILL)
    assert "SIGKILL" in (await ward.words())[-1].text  # type: ignore[union-attr]


async def test_a_core_that_is_ended_by_a_signal_without_a_name(ward: Ward) -> None:
    ward.act(sleep_s=60)
    await ward.connection.send(ORDER)
    os.kill((await ward.core())["pid"], signal.SIGRTMIN + 6)
    ended = (await ward.words())[-1]
    assert ended.text == f"the recovery core ended with signal {signal.SIGRTMIN + 6}"  # type: ignore[union-attr]
    ward.act(ended=GOOD)
    assert (await ward.recover(replace(ORDER, id="r-2"))).ok


REFUSED: dict[str, dict[str, Any]] = {
    "altered-core": signed(b"another"),
    "altered-core, another kind": signed(kind="node"),
    "no-such-target": {
        "ok": False,
        "error": {"code": "no-such-target", "text": "cannot find"},
        "kind": "absent",
    },
    "bad-signature": {
        "ok": False,
        "error": {"code": "bad-signature", "text": "cannot trust"},
        "kind": "trust",
    },
    "cannot-verify": {"ok": True},
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_not_signed_does_not_run(ward: Ward, case: str) -> None:
    ward.act(ended=GOOD)
    ward.signed(REFUSED[case])
    ended = await ward.recover()
    assert (ended.ok, ended.code) == (False, case.partition(",")[0])
    assert not (ward.state / "core.said").exists()
    assert cores(ward) == []
    ward.signed(signed())
    assert (await ward.recover(replace(ORDER, id="r-2"))).ok


async def test_a_core_that_was_changed_on_the_disk(ward: Ward) -> None:
    kept = Incoming(ward.place.layout.incoming).of_sha384(CORE_SHA384)
    assert kept is not None
    kept.archive.write_bytes(zipapp(CORE.replace("late", "evil")))
    ended = await ward.recover()
    assert ended.code == "altered-core"
    assert not (ward.state / "core.said").exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"core": "0" * 96}, "no-core"),
     ({"core": hashlib.sha384(b"").hexdigest()}, "no-core")],
)  # fmt: skip
async def test_no_core(ward: Ward, changes: dict[str, Any], code: str) -> None:
    assert (await ward.recover(replace(ORDER, **changes))).code == code


@pytest.mark.parametrize(
    "changes",
    [{"id": ""}, {"id": "x" * 201}, {"url": "http://x/y"}, {"url": "file:///etc/passwd"}, {"url": "/a b"},
     {"url": "/" + "x" * 3000}, {"sha384": "x"}, {"core": "../x"}, {"digest": "x"}, {"version": "1"},
     {"target": "../x"}, {"target": "node/../x"}, {"lines": []}, {"lines": ["agent", "agent"]},
     {"lines": ["module/x"]}],
    ids=str,
)  # fmt: skip
async def test_orders_of_no_use(place: Place, server: Server, changes: dict[str, Any]) -> None:
    await place.start()
    connection = await server.connection()
    await connection.send(replace(ORDER, **changes))
    assert (await connection.expect(Error)).code == "bad-order"
    await connection.send(ORDER)
    assert (await connection.expect(AgentUpdateEnded)).code == "no-core"


async def test_the_core_outlives_the_agent(ward: Ward, server: Server) -> None:
    """Killed, or told to stop: the core goes on to its end, and the next agent does not start a second one."""
    ward.act(hold=True, end=True, ended=GOOD)
    await ward.connection.send(ORDER)
    core = await ward.core()
    first = ward.place.started[0]
    first.process.kill()
    await first.wait()
    ward.connection.over.set()
    await ward.place.start()
    await server.connection()
    assert not is_gone(core["pid"])
    ward.go()
    await until_gone(core["pid"])
    assert (ward.state / "done").exists()


async def test_a_second_agent_starts_no_second_core(ward: Ward, server: Server) -> None:
    ward.act(hold=True, end=True, ended=GOOD)
    await ward.connection.send(ORDER)
    core = await ward.core()
    first = ward.place.started[0]
    first.process.terminate()
    assert await first.wait() == 0
    ward.connection.over.set()
    await ward.place.start()
    ward.connection = await server.connection()
    (file,) = (ward.state / "run/recovery").glob("core*")
    before = file.stat().st_ctime_ns
    assert (await ward.recover(replace(ORDER, id="r-2"))).code == "recovery-running"
    assert file.stat().st_ctime_ns == before  # the one that runs reads its own file yet
    ward.go()
    await until_gone(core["pid"])
    assert (ward.state / "done").exists()
    ward.act(ended=GOOD)
    assert (await ward.recover(replace(ORDER, id="r-3"))).ok


def cores(ward: Ward) -> list[str]:
    return sorted(path.name for path in (ward.state / "run/recovery").glob("core*"))


async def test_one_that_no_record_names_is_known_by_its_lock(ward: Ward) -> None:
    """Whoever started it was killed before it wrote the record."""
    ward.act(ended=GOOD)
    with RoleLock(ward.place.layout.role_lock("rescue")) as lock:
        lock.acquire(1.0)
        assert (await ward.recover()).code == "recovery-running"
        assert rescue.is_running(ward.place.layout, Clock())
        assert not (ward.state / "core.said").exists()
    assert (await ward.recover(replace(ORDER, id="r-2"))).ok


async def test_each_core_has_a_file_of_its_own(ward: Ward, server: Server) -> None:
    """A second one that gets ready leaves that of the first; the first goes when the second is started."""
    ward.act(ended=GOOD)
    assert (await ward.recover()).ok
    first = cores(ward)
    assert first == [f"core-{hashlib.sha256(ARCHIVE).hexdigest()[:12]}.pyz"]
    archive = zipapp(CORE + "# another\n")
    whole = parcel(archive, kind="recovery")
    wanted = offer(whole, id="u-2", line="recovery", target=TARGET, block=65_536)
    assert (await transfer(ward.connection, wanted, whole)).state == "received"
    order = replace(ORDER, id="r-2", core=hashlib.sha384(whole).hexdigest())
    layout = ward.place.layout
    ward.signed(signed())
    with pytest.raises(TrustError):  # signed is the first
        rescue.prepare(layout, order, [layout.launcher], "00" * 32, "https://127.0.0.1:1")
    assert cores(ward) == first
    ward.signed(signed(archive))
    rescue.prepare(layout, order, [layout.launcher], "00" * 32, "https://127.0.0.1:1")
    second = f"core-{hashlib.sha256(archive).hexdigest()[:12]}.pyz"
    assert cores(ward) == sorted([*first, second])
    assert (await ward.recover(order)).ok
    assert cores(ward) == [second]


@pytest.mark.parametrize(
    ("does", "runs"),
    [("echo active", True), ("echo deactivating; exit 3", True), ("echo inactive; exit 3", False),
     ("echo inactive; exit 4", False), ("exec sleep 30", True), ("echo no bus >&2; exit 1", False),
     ("test -e $0.asked && { echo active; exit 0; }; : > $0.asked; exit 1", True)],
)  # fmt: skip
def test_what_systemd_says_of_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, runs: bool
) -> None:
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\n{does}\n")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert rescue.unit_runs(within_s=1.0 if "sleep" in does else 60.0) is runs


async def test_one_that_does_not_end_is_killed_with_all_it_started(ward: Ward) -> None:
    """Played without a network: the bound is a quarter of an hour otherwise."""
    ward.act(sleep_s=600, child=True)
    said: list[Message] = []

    def send(message: Message) -> bool:
        said.append(message)
        return True

    place = ward.place
    for within_s in (1.5, 15.0, 45.0):  # where much else runs, it takes a while to get so far
        said.clear()
        recovery = Recovery(
            place.layout, place.program, "https://127.0.0.1:1", Clock(), send, within_s=within_s
        )
        task = asyncio.create_task(recovery.run())
        recovery.take(ORDER, "00" * 32)
        async with asyncio.timeout(within_s + 60):
            while not said or not isinstance(said[-1], AgentUpdateEnded):
                await asyncio.sleep(0.02)
        task.cancel()
        assert said[-1].code == "deadline"
        if (ward.state / "child").exists():
            break
    await until_gone((await ward.core())["pid"])
    await until_gone(int((ward.state / "child").read_text()))


async def test_the_real_verify(place: Place, server: Server, short_folder: Path) -> None:
    """No launcher: the agent's own program verifies real metadata; without them it refuses."""
    world = World(short_folder)
    custom = {"kind": "recovery", "version": "1.1.0", "digest": DIGEST}
    core = Release(TARGET, ARCHIVE, hashlib.sha256(ARCHIVE).hexdigest(), custom)
    world.add_blob(ARCHIVE)
    data = offline.add_target(world.targets_bytes, TARGET, len(ARCHIVE), core.sha256, custom, days(90))
    world.repository.publish_targets(world.sign_targets(data), now())
    names = ["1.root.json", *(world.current(role)[0] for role in ("timestamp", "snapshot", "targets"))]
    whole = parcel(ARCHIVE, {f"metadata/{name}": world.served()[name] for name in names}, kind="recovery")

    await place.start()
    connection = await server.connection()
    ward = Ward(place, connection)
    ward.act(ended=GOOD)
    for number, each in enumerate((whole, WHOLE)):
        wanted = offer(each, id=f"u-{number}", line="recovery", target=TARGET, block=65_536)
        assert (await transfer(connection, wanted, each)).state == "received"
    assert (await ward.recover(replace(ORDER, core=hashlib.sha384(whole).hexdigest()))).ok
    (ward.state / "core.said").unlink()
    ended = await ward.recover(replace(ORDER, id="r-2"))
    assert not ended.ok
    assert ended.code not in ("", "core-failed")
    assert not (ward.state / "core.said").exists()
