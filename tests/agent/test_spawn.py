"""One runner process: what it gets, what it may do, and that nothing of it is left, whatever it did."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from instar.agent.runners import Runners
from instar.agent.spawn import STDERR_TAIL
from instar.wire.messages import MAX_FRAME
from tests.agent.spawning import (
    COMMAND,
    GROUPED,
    children,
    descriptors,
    is_gone,
    request,
    run,
    until_file,
    until_gone,
)

KINDS = [(warm, grouped) for warm in (False, True) for grouped in ((True, False) if GROUPED else (False,))]
NAMES = [f"{'warm' if w else 'cold'}-{'group' if g else 'mark'}" for w, g in KINDS]
DAEMON = """
import time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open("pid", "w") as file: file.write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
while not os.path.exists("pid") or not open("pid").read(): time.sleep(0.01)
"""


@pytest.fixture(params=KINDS, ids=NAMES)
async def start(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Runners, bool]]:
    """(runners, warm). Afterwards this process has the descriptors and children that it had before."""
    warm, grouped = request.param
    before = descriptors()
    runners = Runners(COMMAND, grouped)
    yield runners, warm
    await runners.close()
    assert descriptors() == before
    assert children() == []


Start = tuple[Runners, bool]


async def test_a_reply_comes_back(start: Start) -> None:
    done = await run(start[0], "say({'log': 'one'}); say({'progress': 0.5}); reply = {'a': 1}", start[1])
    assert done.said == [{"log": "one"}, {"progress": 0.5}, {"ok": True, "reply": {"a": 1}}]
    assert (done.outcome.exit_code, done.outcome.signal, done.outcome.cut) == (0, 0, "")
    assert 1 << 20 < done.outcome.max_rss < 1 << 30
    assert 0 < done.outcome.seconds < 20
    assert done.outcome.cpu_s > 0
    assert done.run.warm is start[1]


async def test_a_conversation(start: Start, tmp_path: Path) -> None:
    runners, warm = start
    heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    code = "\nwhile (said := hear()) is not None: say({'echo': said})\nreply = None"
    run = await runners.start(request(code, do="serve"), heard.put_nowait, tmp_path, warm)
    async with asyncio.timeout(60):
        for n in range(3):
            run.say({"n": n, "text": "x" * 100_000})
            assert (await heard.get())["echo"]["n"] == n
    run._ends.control._end.shutdown(1)  # the end of what the agent says
    assert await run.ended(60)
    assert (await run.outcome()).exit_code == 0


async def test_a_clean_world(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTAR_TEST_SECRET", "x")
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    code = """
reply = {"fds": sorted(os.listdir("/proc/self/fd")), "env": dict(os.environ), "cwd": os.getcwd(),
         "leader": os.getsid(0) == os.getpid() == os.getpgid(0), "in": os.readlink("/proc/self/fd/0")}
"""
    world = (await run(start[0], code, start[1], cwd=tmp_path)).said[-1]["reply"]
    os.close(leak)
    assert str(leak) not in world["fds"] or leak < 6
    assert len(world["fds"]) <= 6  # 0 to 3, the stand-in's own copy of 3, and the listing itself
    assert "INSTAR_TEST_SECRET" not in world["env"]
    assert (world["cwd"], world["leader"], world["in"]) == (str(tmp_path), True, "/dev/null")
    if not start[1]:
        assert (world["env"]["HOME"], world["env"]["INSTAR_MODULE"]) == (str(tmp_path), "test")


@pytest.mark.parametrize(
    ("code", "exit_code", "signal"),
    [
        ("os.kill(os.getpid(), 11)", 0, 11),
        ("os.abort()", 0, 6),
        ("os._exit(3)", 3, 0),
        ("sys.exit(4)", 4, 0),
        ("raise ValueError('x')", 1, 0),
        ("os.close(3)", 1, 0),
    ],
)
async def test_how_it_ended(start: Start, code: str, exit_code: int, signal: int) -> None:
    outcome = (await run(start[0], code, start[1])).outcome
    assert (outcome.exit_code, outcome.signal, outcome.cut) == (exit_code, signal, "")


@pytest.mark.parametrize(
    "code",
    [
        "while True: say(b'x' * 65536)",
        "while True: say({'log': 'x' * 1000})",
        f"say(b'x' * {MAX_FRAME + 100} + bytes([10]))",
        "say(bytes(MAX))",
    ],
)
async def test_too_much_output_ends_it(start: Start, code: str) -> None:
    done = await run(start[0], code.replace("MAX", str(3 << 20)), start[1])
    assert done.outcome.cut == "output"
    assert sum(len(str(said)) for said in done.said) < 2 << 20


async def test_nonsense_is_dropped(start: Start) -> None:
    lines = [
        b"{broken",
        b"[]",
        b'"x"',
        b"7",
        b"[" * 50_000,
        b"",
        b"\xff\xfe",
        b"9" * 5_000,
        b'{"log": "good"}',
    ]
    code = f"for line in {lines!r}: say(line + bytes([10]))"
    done = await run(start[0], code, start[1])
    assert done.said == [{"log": "good"}, {"ok": True, "reply": {}}]
    assert done.outcome.cut == ""


async def test_only_the_tail_of_errors_is_kept(start: Start) -> None:
    code = "for n in range(20000): print('line', n, file=sys.stderr)\nsys.stderr.flush(); os._exit(4)"
    outcome = (await run(start[0], code, start[1])).outcome
    assert outcome.exit_code == 4
    assert len(outcome.stderr) <= STDERR_TAIL
    assert outcome.stderr.endswith("line 19999\n")


async def test_endless_errors_end_it(start: Start) -> None:
    code = "while True: os.write(2, b'x' * 65536)"
    outcome = (await run(start[0], code, start[1], within_s=120)).outcome
    assert outcome.cut == "output"
    assert len(outcome.stderr) == STDERR_TAIL


async def test_a_deadline_is_kept_by_one_that_ignores_signals(start: Start) -> None:
    code = "import signal, time\nfor n in range(1, 32):\n try: signal.signal(n, signal.SIG_IGN)\n except OSError: pass\ntime.sleep(600)"
    code = code.replace("time.sleep(600)", "say({'log': 'deaf'}); time.sleep(600)")
    async with asyncio.timeout(120):
        for within_s in (0.5, 5.0, 30.0):  # where much else runs, it takes a while to get so far
            done = await run(start[0], code, start[1], within_s=within_s)
            assert (done.outcome.cut, done.outcome.signal) == ("deadline", 9)
            if done.said:
                break
    assert done.said == [{"log": "deaf"}]


@pytest.mark.parametrize("how", ["ends", "is killed"])
async def test_what_left_its_session_ends_with_it(start: Start, tmp_path: Path, how: str) -> None:
    code = DAEMON + ("" if how == "ends" else "time.sleep(600)")
    runners, warm = start
    started = await runners.start(request(code), lambda _: None, tmp_path, warm)
    pid = int(await until_file(tmp_path / "pid"))
    if how == "is killed":
        started.kill("deadline")
    assert await started.ended(60)
    assert (await started.outcome()).cut == ("" if how == "ends" else "deadline")
    await until_gone(pid)


async def test_what_it_left_in_its_group_ends_with_it(start: Start, tmp_path: Path) -> None:
    code = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open("pid", "w") as file: file.write(str(child.pid))
"""
    assert (await run(start[0], code, start[1], cwd=tmp_path)).outcome.cut == ""
    await until_gone(int((tmp_path / "pid").read_text()))


async def test_more_processes_than_allowed_end_it(start: Start) -> None:
    """A bomb that is bounded, for the sake of the machine when this test fails."""
    code = (
        "import time\nfor n in range(60):\n if os.fork() == 0: time.sleep(600); os._exit(0)\ntime.sleep(600)"
    )
    done = await run(start[0], code, start[1], processes=10)
    assert (done.outcome.cut, done.outcome.signal) == ("processes", 9)


async def test_one_that_does_not_read_is_ended(start: Start, tmp_path: Path) -> None:
    runners, warm = start
    run = await runners.start(
        request("import time; time.sleep(600)", do="serve"), lambda _: None, tmp_path, warm
    )
    for _ in range(50):
        run.say({"text": "x" * 100_000})
    assert await run.ended(60)
    assert (await run.outcome()).cut == "output"


async def test_to_say_something_to_one_that_is_gone(start: Start, tmp_path: Path) -> None:
    runners, warm = start
    run = await runners.start(request(""), lambda _: None, tmp_path, warm)
    assert await run.ended(60)
    run.say({"do": "stop"})
    run.kill("late")
    outcome = await run.outcome()
    run.say({"do": "stop"})
    assert await run.outcome() == outcome
    assert outcome.cut == ""


async def test_nothing_runs_before_it_was_begun(start: Start, tmp_path: Path) -> None:
    runners, warm = start

    def refuse() -> None:
        raise ValueError("the disk is full")

    for _ in range(2):
        with pytest.raises(ValueError, match="the disk is full"):
            await runners.start(request("open('ran', 'w')"), lambda _: None, tmp_path, warm, refuse)
    assert not (tmp_path / "ran").exists()


async def test_cancelled_in_the_middle(start: Start, tmp_path: Path) -> None:
    runners, warm = start
    task = asyncio.create_task(run(runners, "open('pid', 'w').write(str(os.getpid())); import time; time.sleep(600)", warm, cwd=tmp_path))  # fmt: skip
    pid = int(await until_file(tmp_path / "pid"))
    task.cancel()
    await asyncio.wait([task])
    assert not is_gone(pid)  # whoever was cancelled has not asked for its outcome: that is the owner's part
    owned = next(each for each in runners._runs if each.pid == pid)
    await owned.outcome()
    assert is_gone(pid)


async def test_a_folder_that_is_not_there(start: Start) -> None:
    if start[1]:
        return  # there the runner says it
    with pytest.raises(OSError, match="No such file"):
        await start[0].start(request(""), lambda _: None, Path("/does/not/exist"), False)
    assert Path.cwd().exists()


async def test_a_program_that_is_not_there() -> None:
    before = descriptors()
    runners = Runners(["/does/not/exist"], GROUPED)
    for warm in (True, False):
        with pytest.raises(OSError, match="No such file"):
            await runners.start(request(""), lambda _: None, Path("/"), warm)
    await runners.close()
    assert descriptors() == before
