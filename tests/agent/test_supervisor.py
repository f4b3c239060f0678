"""Service modules: kept running, restarted, stopped in order, asked. Real processes, real kills."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instar.core.errors import InputError
from instar.host import processes
from instar.host.clock import Clock
from tests.agent.acting import World, module
from tests.agent.spawning import children, is_gone, until_gone


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_what_is_there_is_started_and_told(world: World) -> None:
    world.add(module("a"))
    world.add(module("b"))
    async with world.running() as supervisor:
        await world.all_ok()
        assert supervisor.digests() == {n: m.digest for n, m in world.shelf.found.items()}
        row = world.row("a")
        assert (row["version"], row["life"], row["restarts"], row["error"]) == ("1.0.0", "ready", 0, "")
        assert supervisor.pids()["a"] == row["pid"]
        record = processes.recorded(world.layout.module("a").process)
        assert record is not None
        assert (record.pid, record.release) == (row["pid"], world.shelf.found["a"].release)
        assert sorted(world.shelf.used) == ["a", "b"]
        assert world.changes >= 4
    await until_gone(row["pid"])
    assert world.kept("a") == {"starts": 1, "saved": True}
    assert not world.layout.module("a").process.exists()


# --- restarts


async def test_one_is_restarted_and_finds_its_state_again(world: World) -> None:
    world.add(module("a"))
    world.add(module("b"))
    async with world.running() as supervisor:
        await world.all_ok()
        before = supervisor.pids()
        assert await supervisor.restart(["a"], 30.0, "local:0") == {"a": "running"}
        after = supervisor.pids()
        assert after["a"] != before["a"]
        assert after["b"] == before["b"]
        assert world.kept("a") == {"starts": 2, "saved": True}
        assert is_gone(before["a"])


async def test_all_are_restarted_in_the_order_of_what_depends_on_what(world: World) -> None:
    world.add(module("web", depends=("db", "cache")))
    world.add(module("db", depends=("disk",)), start_s=0.3)
    world.add(module("cache"))
    world.add(module("disk"), start_s=0.3)
    async with world.running() as supervisor:
        await world.all_ok()
        first = world.order()
        assert set(await supervisor.restart([], 30.0, "server:x")) == {"web", "db", "cache", "disk"}
        assert set(supervisor.states().values()) == {"ok"}
        again = [line.rpartition(" ")[0] for line in world.order()[len(first) :]]
    begun = [line.split()[0] for line in first]
    assert begun.index("disk") < begun.index("db") < begun.index("web")
    assert begun.index("cache") < begun.index("web")
    for low, high in (("db", "web"), ("cache", "web"), ("disk", "db")):
        assert again.index(f"{high} stop") < again.index(f"{low} asked")
        assert again.index(f"{low} start") < again.index(f"{high} start")


async def test_what_depends_on_a_chosen_one_is_restarted_with_it(world: World) -> None:
    world.add(module("db"))
    world.add(module("web", depends=("db",)))
    world.add(module("other"))
    async with world.running() as supervisor:
        await world.all_ok()
        assert set(await supervisor.restart(["db"], 30.0, "x")) == {"db", "web"}
        assert set(await supervisor.restart(["web"], 30.0, "x")) == {"web"}


async def test_an_unknown_name_stops_nothing(world: World) -> None:
    world.add(module("a"))
    async with world.running() as supervisor:
        await world.all_ok()
        pid = supervisor.pids()["a"]
        with pytest.raises(InputError) as caught:
            await supervisor.restart(["a", "moon"], 30.0, "x")
        assert caught.value.code == "unknown-module"
        assert not is_gone(pid)


async def test_a_busy_one_is_waited_for(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    world.add(module("a"), busy_s=0.6)
    async with world.running() as supervisor:
        await world.all_ok()
        assert await supervisor.restart(["a"], 30.0, "local:7") == {"a": "running"}
        assert world.kept("a")["saved"] is True
    assert "module a is busy: an operation" in caplog.text
    assert "restart of a begins, asked by local:7" in caplog.text
    assert "restart of a, asked by local:7, ended after" in caplog.text


async def test_a_deaf_one_is_killed_after_its_own_bound(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.add(module("a", stop_s=0.4), deaf=True)
    async with world.running() as supervisor:
        await world.all_ok()
        pid, began = supervisor.pids()["a"], time.monotonic()
        world.act("a")
        assert await supervisor.restart(["a"], 600.0, "x") == {"a": "running"}
        assert 0.4 <= time.monotonic() - began < 120.0
        assert is_gone(pid)
    assert "module a was not stopped within 0.4 s: it is killed" in caplog.text


async def test_the_whole_is_bounded_and_what_is_killed_is_started_again(world: World) -> None:
    world.add(module("top", depends=("low",), stop_s=600.0), deaf=True)
    world.add(module("low", stop_s=600.0))
    async with world.running() as supervisor:
        await world.all_ok()
        world.act("top")
        began = time.monotonic()
        found = await supervisor.restart([], 18.0, "x")
        assert time.monotonic() - began < 120.0
        assert found == {"top": "running", "low": "running"}
        assert world.kept("low")["saved"] is True  # it had time of its own
        assert world.row("top")["life"] == "ready"


async def test_what_does_not_come_up_again_is_told_with_its_reason(world: World) -> None:
    world.add(module("a", ready_s=1.5))
    world.add(module("b"))
    async with world.running() as supervisor:
        await world.all_ok()
        world.act("a", start_s=60)
        world.act("b", error="expected ABI 1, got 2")
        found = await supervisor.restart([], 90.0, "x")
        assert min(world.row(name)["restarts"] for name in "ab") >= 3  # tried again before that was said
    assert found["a"] == "failed: it did not say that it is ready within 1.5 s, and was killed"
    assert found["b"].startswith("failed: it ended with exit status 1 after")
    assert found["b"].endswith("expected ABI 1, got 2")


async def test_a_restart_that_is_cut_off_can_be_followed_by_a_stop(world: World) -> None:
    world.add(module("a"), busy_s=30.0)
    async with world.running() as supervisor:
        await world.all_ok()
        pid = supervisor.pids()["a"]
        task = asyncio.create_task(supervisor.restart([], 60.0, "x"))
        await world.until(lambda: world.row("a")["life"] == "stop-asked")
        task.cancel()
        await asyncio.wait([task])
        assert await supervisor.stop_all(0.3, "x") == {"a": "killed"}
        assert is_gone(pid)
        assert supervisor.states() == {"a": "starting"}


# --- falls


async def test_a_crash_is_told_and_the_module_comes_back(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.add(module("a"), fall_s=0.1, falls=1)
    async with world.running() as supervisor:
        await world.until(lambda: world.row("a")["signal"] == signal.SIGSEGV)
        await world.until(lambda: supervisor.states()["a"] == "failed")
        row = world.row("a")
        assert row["max_rss"] > 1 << 20
        assert row["stderr"].endswith("about to fall\\n")
        assert "ended by SIGSEGV after" in row["error"]
        await world.all_ok()
        assert world.row("a")["restarts"] == 1
    assert "module a failed: it was ended by SIGSEGV" in caplog.text


async def test_a_clean_exit_that_nobody_asked_for_is_a_failure(world: World) -> None:
    world.add(module("a"), fall_s=0.1, exit=0)
    async with world.running() as supervisor:
        await world.until(lambda: world.row("a")["restarts"] >= 1)
        assert supervisor.states()["a"] == "failed"
        assert "it ended with exit status 0" in world.row("a")["error"]


async def test_one_that_falls_right_after_it_is_ready_stays_failed(world: World) -> None:
    world.add(module("a"), fall_s=0.05, exit=1)
    async with world.running() as supervisor:
        await world.until(lambda: world.row("a")["restarts"] >= 1)
        seen, starts = set(), world.kept("a")["starts"]
        while world.kept("a")["starts"] < starts + 2:
            seen.add(supervisor.states()["a"])
            await asyncio.sleep(0.005)
        assert seen == {"failed"}


async def test_waits_between_falls_grow(world: World) -> None:
    world.add(module("a"), fall_s=0.0, exit=1)
    times: list[float] = []
    async with world.running(), asyncio.timeout(60):
        while len(times) < 4:
            starts = world.order().count("a start 1.0.0")
            if starts > len(times):
                times.append(time.monotonic())
            await asyncio.sleep(0.01)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] >= 0.4
    assert gaps[2] >= 0.9


async def test_a_restart_that_was_asked_for_forgives_earlier_falls(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    world.add(module("a"), fall_s=0.0, exit=1)
    async with world.running() as supervisor:
        await world.until(lambda: "next try in 1.0 s" in caplog.text)  # the third
        world.act("a")
        assert await supervisor.restart(["a"], 30.0, "x") == {"a": "running"}
        caplog.clear()
        os.kill(supervisor.pids()["a"], signal.SIGKILL)
        await world.until(lambda: "next try in" in caplog.text)
        assert "next try in 0.5 s" in caplog.text


async def test_never_ready_is_killed_and_failed(world: World) -> None:
    world.add(module("a", ready_s=0.3), start_s=60)
    async with world.running() as supervisor:
        await world.until(lambda: supervisor.pids()["a"] > 0)
        pid = supervisor.pids()["a"]
        await world.until(lambda: supervisor.states()["a"] == "failed")
        assert "did not say that it is ready within 0.3 s" in world.row("a")["error"]
        await until_gone(pid)


async def test_a_kill_from_outside_is_a_fall(world: World) -> None:
    world.add(module("a"))
    world.add(module("web", depends=("a",)))
    async with world.running() as supervisor:
        await world.all_ok()
        pids = supervisor.pids()
        os.kill(pids["a"], signal.SIGKILL)
        await world.until(lambda: supervisor.states()["a"] == "failed")
        await world.all_ok()
        assert supervisor.pids()["web"] == pids["web"]  # it goes on
        assert world.kept("a") == {"starts": 2}


async def test_it_may_say_that_it_is_not_well(world: World) -> None:
    said = [{"state": "failed", "text": "no disk"}, {"state": 7}, {"stopping": []}, {"log": "hello\n\x1b[1m"}]
    world.add(module("a"), says=said)
    async with world.running() as supervisor:
        await world.until(lambda: world.row("a")["life"] == "unwell")
        assert supervisor.states() == {"a": "failed"}
        assert world.row("a")["error"] == "no disk"
        assert (await world.asked("a"))["starts"] == 1
    assert world.kept("a")["saved"] is True


async def test_a_runner_that_cannot_be_started_is_a_failure(world: World) -> None:
    world.add(module("a"))
    world.layout.module("a").data.chmod(0o700)
    (world.layout.module("a").data / "act.json").unlink()
    world.layout.module("a").data.rmdir()
    world.layout.module("a").data.write_text("in the way")
    async with world.running() as supervisor:
        await world.until(lambda: supervisor.states()["a"] == "failed")
        assert "cannot start" in world.row("a")["error"]


# --- dependencies


async def test_missing_and_circular_ones_fail_with_the_reason(world: World) -> None:
    world.add(module("lost", depends=("gone",)))
    world.add(module("x", depends=("y",)))
    world.add(module("y", depends=("x",)))
    world.add(module("above", depends=("lost",)))
    world.add(module("well"))
    async with world.running() as supervisor:
        await world.until(
            lambda: supervisor.states()["above"] == "failed" and supervisor.states()["well"] == "ok"
        )
        assert supervisor.states() == dict.fromkeys(("lost", "x", "y", "above"), "failed") | {"well": "ok"}
        assert world.row("lost")["error"] == "it depends on gone, which is not on this node"
        assert world.row("x")["error"] == "it depends on y, which depends on it"
        assert world.row("above")["error"] == "it waits for lost, which failed"
        found = await supervisor.restart([], 10.0, "x")
        assert found["well"] == "running"
        assert found["x"] == "failed: it depends on y, which depends on it"


async def test_one_that_waited_starts_once_the_other_is_there(world: World) -> None:
    world.add(module("web", depends=("db",)))
    async with world.running() as supervisor:
        await world.until(lambda: supervisor.states()["web"] == "failed")
        world.add(module("db"))
        await supervisor.reload("db")
        await world.all_ok()


# --- reload


async def test_a_moved_link_replaces_the_module_and_an_absent_one_ends_it(world: World) -> None:
    world.add(module("a"))
    world.add(module("web", depends=("a",)))
    async with world.running() as supervisor:
        await world.all_ok()
        pids = supervisor.pids()
        await supervisor.reload("a")  # nothing has moved
        assert supervisor.pids() == pids
        new = module("a", "1.1.0")
        world.add(new)
        await supervisor.reload("a")
        await world.all_ok()
        assert supervisor.digests()["a"] == new.digest
        assert world.row("a")["version"] == "1.1.0"
        assert supervisor.pids()["web"] not in (0, pids["web"])
        del world.shelf.found["a"]
        await supervisor.reload("a")
        await world.until(lambda: supervisor.states() == {"web": "failed"})
        await supervisor.reload("never-heard-of")


# --- strays


async def test_a_process_of_a_dead_agent_is_ended_first(world: World) -> None:
    world.add(module("a", stop_s=0.5))
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(60)"
    )
    strays = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code], start_new_session=True, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    children: list[int] = []
    for stray, name in zip(strays, ("a", "retired"), strict=True):
        assert stray.stdout is not None
        children.append(int(stray.stdout.readline()))
        path = world.layout.module(name).process
        path.parent.mkdir(parents=True, exist_ok=True)
        clock = Clock()
        processes.record(
            path, processes.Process(stray.pid, processes.start_time(stray.pid) or 0, clock.boot_id())
        )
    async with world.running():
        await world.all_ok()
        assert strays[0].poll() == -signal.SIGKILL  # before the new one was started
        await world.until(lambda: not world.layout.module("retired").process.exists())
        assert strays[1].poll() == -signal.SIGKILL
        for child in children:
            await until_gone(child)


async def test_a_stranger_with_a_recorded_number_is_left_alone(world: World) -> None:
    world.add(module("a"))
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        path = world.layout.module("a").process
        processes.record(path, processes.Process(stranger.pid, 1, Clock().boot_id()))
        async with world.running():
            await world.all_ok()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_thirty_restarts_leave_nothing_behind(world: World) -> None:
    world.add(module("a"))
    world.add(module("b", depends=("a",)))
    async with world.running() as supervisor:
        await world.all_ok()
        before = len(os.listdir("/proc/self/fd"))
        for number in range(30):
            names = [[], ["a"], ["b"]][number % 3]
            assert set((await supervisor.restart(names, 30.0, "x")).values()) == {"running"}
        assert len(os.listdir("/proc/self/fd")) <= before
        starts = world.kept("a")["starts"]
        assert starts == 21
        await world.until(lambda: not [pid for pid in children() if is_gone(pid)])  # no zombies
    assert json.loads((world.layout.module("a").data / "state.json").read_bytes())["saved"] is True
