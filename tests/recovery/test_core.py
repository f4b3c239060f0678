"""The recovery core as it really runs: a zipapp under -I -S, on real nodes, against a played server (M5)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from instar.core.journal import Begin
from instar.engine.journal import Journals
from instar.host import trials
from instar.host.line import Line
from instar.host.services import by_name
from instar.rescue.role import UpdatersRole
from instar_lab.program import variants
from instar_server.trust.pack import Release
from tests.agent.fleet import Authority
from tests.recovery.conftest import Builds
from tests.recovery.gateway import Gateway
from tests.recovery.place import Place


async def running(place: Place, builds: Builds) -> dict[str, int]:
    """Start the node; who plays each role."""
    place.keep()
    await place.until(lambda: place.is_on(builds.old))
    await place.until(lambda: place.layout.socket("agent").exists())
    await place.gateway.call("agent")
    return {role: place.pid(role) for role in ("agent", "updater")}


def settled(place: Place, resumable: bool = False) -> None:
    """`resumable`: a core that was ended leaves what it has fetched to the next."""
    assert Journals(place.layout.journal, place.clock).unfinished() == []
    assert list(place.layout.staging.iterdir()) == []
    for role in ("agent", "updater"):
        assert trials.read(Line(place.layout.line(role))) is None
    rescue = place.state / "rescue"
    assert resumable or not rescue.exists() or list(rescue.iterdir()) == []


async def test_both_lines_of_a_healthy_node(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    before = await running(place, builds)
    ended = await place.run_core(builds.core_file, place.order(release, ["updater", "agent"]))
    assert (ended.status, ended.end) == (0, {"ok": True, "code": "", "text": ""}), ended.stderr
    assert ended.downloaded
    assert ended.phases == [
        "verify", "fetch", "take-over",
        *(f"agent:{state}" for state in ("staged", "verified", "rehearsed", "trial", "confirming", "confirmed")),
        *(phase for phase in ended.phases if phase.startswith("updater:")),
    ]  # fmt: skip
    await place.until(lambda: place.is_on(builds.new))
    assert place.pid("agent") != before["agent"]
    settled(place)
    phases = {(event["line"], event["phase"]) for event in gateway.events}
    assert {("agent", "confirmed"), ("updater", "confirmed")} <= phases
    begun = [journal.progress.begin for journal in Journals(place.layout.journal, place.clock).read_all()]
    assert {(begin.cause, begin.via) for begin in begun} == {("recovery", "recovery")}


async def test_only_the_line_that_is_ordered(place: Place, builds: Builds, release: Release) -> None:
    await running(place, builds)
    ended = await place.run_core(builds.core_file, place.order(release, ["agent"]))
    assert ended.status == 0, ended.stderr
    assert place.is_on(builds.new, ("agent",))
    await place.until(lambda: place.is_on(builds.old, ("updater",)))
    again = await place.run_core(builds.core_file, place.order(release, ["agent"]))  # nothing left to do
    assert (again.status, "agent:trial" in again.phases) == (0, False)


@pytest.mark.parametrize("harm", ["zeros", "deleted"])
async def test_a_node_of_which_nothing_is_left(
    place: Place, builds: Builds, release: Release, harm: str
) -> None:
    for role in ("agent", "updater"):
        place.zero(role) if harm == "zeros" else place.delete(role)
    place.keep()
    ended = await place.run_core(builds.core_file, place.order(release, ["agent", "updater"]))
    assert ended.status == 0, (ended.said, ended.stderr, place.logs())
    await place.until(lambda: place.is_on(builds.new))
    settled(place)


async def test_the_very_release_whose_files_are_damaged_is_put_there_anew(
    place: Place, gateway: Gateway, builds: Builds
) -> None:
    release = gateway.publish(builds.old)
    before = await running(place, builds)
    for role in ("agent", "updater"):
        place.zero(role)
    ended = await place.run_core(builds.core_file, place.order(release, ["agent", "updater"]))
    assert ended.status == 0, (ended.said, ended.stderr, place.logs())
    await place.until(lambda: place.is_on(builds.old))
    assert place.pid("agent") != before["agent"]
    settled(place)


# --- refused, and the node left as it was


async def unharmed(place: Place, builds: Builds, before: dict[str, int]) -> None:
    assert place.pid("agent") == before["agent"]
    await place.until(lambda: place.is_on(builds.old))
    settled(place)


async def test_another_certificate_than_the_channels_is_refused(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    before = await running(place, builds)
    gateway.asked.clear()
    ended = await place.run_core(builds.core_file, place.order(release, ["agent"], pin="ab" * 32))
    assert (ended.status, ended.end["ok"], ended.end["code"]) == (3, False, "certificate-differs")
    assert not ended.downloaded
    assert [path for path in gateway.asked if path.startswith("/v1/targets")] == []
    assert place.pid("updater") == before["updater"]
    await unharmed(place, builds, before)


async def test_an_archive_server_with_another_certificate_is_refused(
    place: Place, gateway: Gateway, builds: Builds, release: Release, folder: Path, authority: Authority
) -> None:
    before = await running(place, builds)
    other = Gateway(folder, authority, gateway.world)
    (folder / "other").mkdir()
    other.folder = folder / "other"
    await other.start()
    try:
        path = json.loads(place.order(release, ["agent"]).read_text())["url"]
        ended = await place.run_core(
            builds.core_file, place.order(release, ["agent"], url=f"{other.url}{path}")
        )
    finally:
        await other.stop()
    assert (ended.status, ended.end["code"]) == (3, "certificate-differs")
    assert other.asked == []
    await unharmed(place, builds, before)


async def test_bad_hashes_are_bounded(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    before = await running(place, builds)
    ended = await place.run_core(builds.core_file, place.order(release, ["agent"], sha384="ab" * 48))
    assert (ended.status, ended.end["code"]) == (3, "bad-hash")
    fetched = [path for path in gateway.asked if path.startswith("/v1/targets")]
    assert len(fetched) == 3
    assert place.pid("updater") == before["updater"]
    await unharmed(place, builds, before)


async def test_bytes_that_fit_the_order_but_are_not_signed_are_refused(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    before = await running(place, builds)
    path = json.loads(place.order(release, ["agent"]).read_text())["url"].removeprefix("/v1/targets/")
    altered = release.archive[:-1] + bytes([release.archive[-1] ^ 1])
    gateway.served[path] = altered
    sha384 = hashlib.sha384(altered).hexdigest()
    ended = await place.run_core(builds.core_file, place.order(release, ["agent"], sha384=sha384))
    assert (ended.end["ok"], ended.end["code"]) == (False, "altered-blob"), ended.stderr
    await unharmed(place, builds, before)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"digest": "ab" * 48}, "wish-differs"),
        ({"target": "node/instar-7.7.7.tar.gz"}, "no-such-target"),
        ({"url": "/v1/targets/nothing"}, "not-found"),
    ],
)
async def test_what_is_not_there_or_not_signed_so(
    place: Place, builds: Builds, release: Release, changes: dict[str, Any], code: str
) -> None:
    ended = await place.run_core(builds.core_file, place.order(release, ["agent"], **changes))
    assert ended.status != 0
    assert ended.end["code"] == code
    assert Line(place.layout.line("agent")).current() == builds.old.release
    settled(place)


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2}, {"id": "../x"}, {"id": ""}, {"url": "http://h/x"}, {"url": "file:///etc/passwd"},
        {"url": "https://user@h/x"}, {"sha384": "ab"}, {"version": "one"}, {"digest": "xy"},
        {"target": "../x"}, {"target": ""}, {"lines": []}, {"lines": ["moon"]}, {"lines": "agent"},
        {"pin": ""}, {"pin": "AB" * 32}, {"server": "https://h/path"}, {"server": 7}, {"url": 5},
    ],
)  # fmt: skip
async def test_a_bad_order_changes_nothing(
    place: Place, builds: Builds, release: Release, changes: dict[str, Any]
) -> None:
    ended = await place.run_core(builds.core_file, place.order(release, ["agent"], **changes))
    assert (ended.status, ended.end["code"], ended.phases) == (2, "bad-order", [])


async def test_a_release_that_does_not_start_is_put_back(
    place: Place, gateway: Gateway, builds: Builds
) -> None:
    before = await running(place, builds)
    gateway.verdicts["trial"] = "wait"
    bad = gateway.publish(variants.variant("crashes-once-activated", "1.2.0"))
    ended = await place.run_core(builds.core_file, place.order(bad, ["agent"]))
    assert (ended.status, ended.end["ok"]) == (7, False), ended.said
    assert "put back" in ended.end["text"]
    await place.until(lambda: place.is_on(builds.old))
    assert place.pid("agent") != before["agent"]
    settled(place)


# --- broken in other ways


async def test_an_updater_that_hangs_and_ignores_term_is_replaced(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    hanging = variants.variant("hangs", "1.0.1")
    place.put("updater", hanging)
    place.keep()
    await place.until(lambda: place.is_on(builds.old, ("agent",)))
    await place.until(lambda: place.runs("updater") == hanging.digest)
    ended = await place.run_core(builds.core_file, place.order(release, ["agent", "updater"]))
    assert ended.status == 0, (ended.said, ended.stderr)
    await place.until(lambda: place.is_on(builds.new))
    settled(place)


async def test_what_an_updater_left_open_is_ended(
    place: Place, builds: Builds, release: Release, gateway: Gateway
) -> None:
    line = Line(place.layout.line("agent"))
    journals = Journals(place.layout.journal, place.clock)
    for role in ("agent", "updater"):
        target = "node/instar-3.0.0.tar.gz"
        journals.begin(Begin(f"tx-{role}", role, "3.0.0", "cd" * 48, target, line.current(), "", "wish"))
    ended = await place.run_core(builds.core_file, place.order(release, ["agent", "updater"]))
    assert ended.status == 0, (ended.said, ended.stderr, place.logs())
    found = {j.progress.begin.tx: j.progress for j in journals.read_all()}
    for role in ("agent", "updater"):
        assert found[f"tx-{role}"].state.value == "reverted"
        reason = found[f"tx-{role}"].reason
        assert reason is not None
        assert reason.code == "superseded"
    settled(place)


async def test_a_cut_download_is_resumed(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    gateway.cut_at = [1 << 18, 3 << 18]
    ended = await place.run_core(builds.core_file, place.order(release, ["agent"]))
    assert ended.status == 0, (ended.said, ended.stderr, place.logs())
    assert gateway.cut_at == []


async def test_two_cores_are_one_too_many(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    gateway.flows.clear()
    first = place.start_core(builds.core_file, place.order(release, ["agent"]))
    await place.until(lambda: any(path.startswith("/v1/targets") for path in gateway.asked))
    second = await place.run_core(builds.core_file, place.order(release, ["agent"]))
    assert (second.status, second.end["code"]) == (4, "busy")
    gateway.flows.set()
    assert await asyncio.to_thread(first.wait, 240) == 0


async def test_nobody_listens_and_it_goes_on(place: Place, builds: Builds, release: Release) -> None:
    """Whoever started it may be what it replaces."""
    child = place.start_core(builds.core_file, place.order(release, ["agent"]))
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    child.stderr.close()
    assert await asyncio.to_thread(child.wait, 240) == 0
    assert place.is_on(builds.new, ("agent",))


async def test_term_gives_the_role_back(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    await running(place, builds)
    gateway.verdicts["trial"] = "wait"
    child = place.start_core(builds.core_file, place.order(release, ["agent"]))
    await place.until(lambda: place.layout.line("agent").trial.exists())
    child.send_signal(signal.SIGTERM)
    out, _ = await asyncio.to_thread(child.communicate, None, 120)
    assert json.loads(out.splitlines()[-1])["ended"]["code"] == "interrupted"
    gateway.verdicts["trial"] = "pass"
    await place.until(lambda: place.is_on(builds.new, ("agent",)) and place.is_on(builds.old, ("updater",)))
    await place.until(lambda: Journals(place.layout.journal, place.clock).unfinished() == [])
    settled(place, resumable=True)


async def test_killed_anywhere_the_node_comes_back(
    place: Place, gateway: Gateway, builds: Builds, release: Release
) -> None:
    """After each kill the node runs one verified release of each line, by its own means."""
    await running(place, builds)
    spread = random.Random(os.environ.get("INSTAR_SEED", "4"))
    for _ in range(6):
        child = place.start_core(builds.core_file, place.order(release, ["agent", "updater"]))
        await asyncio.sleep(spread.uniform(0.2, 2.5))
        with_it = child.poll()
        os.killpg(child.pid, signal.SIGKILL) if with_it is None else None
        child.wait()
        await place.until(lambda: all(one_sound(place, builds, role) for role in ("agent", "updater")))
        await place.until(lambda: Journals(place.layout.journal, place.clock).unfinished() == [])
    ended = await place.run_core(builds.core_file, place.order(release, ["agent", "updater"]))
    assert ended.status == 0, (ended.said, ended.stderr, place.logs())
    await place.until(lambda: place.is_on(builds.new))
    settled(place)


def one_sound(place: Place, builds: Builds, role: str) -> bool:
    return any(place.is_on(program, (role,)) for program in (builds.old, builds.new))


async def test_a_hung_updater_whose_record_is_damaged_has_to_go(place: Place, builds: Builds) -> None:
    """It answers nothing, not TERM either, and nothing names it."""
    words = place.command("launch", "updater")
    updater = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    place.started.append(updater)
    await place.until(lambda: place.layout.socket("updater").exists())  # it has the lock by then
    updater.send_signal(signal.SIGSTOP)
    record = place.layout.process("updater")
    record.write_bytes(bytes(record.stat().st_size))
    role = UpdatersRole(place.layout, place.clock, by_name("none", place.layout, place.clock))
    await asyncio.to_thread(role.take)
    assert role.held
    assert await asyncio.to_thread(updater.wait, 60) == -signal.SIGKILL
