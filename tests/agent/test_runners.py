"""The fork server and those around it: used, worn, killed, hung; and hundreds of runs leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from instar.agent.runners import SPARE_S, SPARES, Runners
from instar.agent.running import run_job
from instar.agent.spawn import Run
from instar.host import cgroups
from instar.host.program import Program
from instar.wire.messages import Job
from tests.agent.fleet import VERSION
from tests.agent.spawning import (
    COMMAND,
    GROUPED,
    children,
    descriptors,
    is_gone,
    request,
    run,
    until,
    until_gone,
)

NONCE = "ab" * 16
SELFTEST = Job("j-1", "selftest", args={"nonce": NONCE}, deadline_s=20.0)
grouped_only = pytest.mark.skipif(not GROUPED, reason="no cgroup v2 of ours on this machine")


@pytest.fixture
async def runners() -> AsyncIterator[Runners]:
    before = descriptors()
    made = Runners(COMMAND, GROUPED)
    yield made
    await made.close()
    assert descriptors() == before
    assert children() == []


async def until_spares(runners: Runners) -> None:
    """Until all are there, and nothing is left of the run before."""
    await until(lambda: len(runners._spares) == SPARES and not runners._tasks, "the spares")


async def sleeping(runners: Runners, warm: bool = True) -> Run:
    return await runners.start(request("import time; time.sleep(600)"), lambda _: None, Path("/tmp"), warm)


async def test_nothing_is_started_before_it_is_needed() -> None:
    runners = Runners(["/does/not/exist"])
    assert runners.warm_pid == 0
    await runners.close()
    await runners.close()


async def test_warm_runs_come_from_one_server(runners: Runners) -> None:
    first = await run(runners, "reply = {'parent': os.getppid()}")
    second = await run(runners, "reply = {'parent': os.getppid()}")
    assert first.said[-1]["reply"] == second.said[-1]["reply"] == {"parent": runners.warm_pid}


async def test_a_service_is_no_child_of_the_fork_server(runners: Runners) -> None:
    done = await run(runners, "reply = {'parent': os.getppid()}", warm=False)
    assert done.said[-1]["reply"] == {"parent": os.getpid()}
    assert runners.warm_pid == 0


async def test_hundreds_of_runs_leave_nothing(runners: Runners) -> None:
    await run(runners, "")
    await until_spares(runners)
    fds, own = descriptors(), len(children())
    for batch in range(15):
        codes = ["", "os.abort()", "os._exit(2)", "say(b'x' * 3000000)"] * 5
        done = await asyncio.gather(*(run(runners, code) for code in codes))
        signals = [each.outcome.signal for each in done]
        assert signals[0::4] == [0] * 5, batch
        assert signals[1::4] == [6] * 5, batch
    await until_spares(runners)
    await until(lambda: len(descriptors()) == len(fds), f"as many descriptors as before: {len(fds)}")
    assert len(children()) == own == 1
    await until(lambda: len(os.listdir(f"/proc/{runners.warm_pid}/fd")) < 12, "few descriptors there")


async def test_cold_runs_leave_nothing(runners: Runners) -> None:
    await run(runners, "", warm=False)
    fds = descriptors()
    for _ in range(5):
        await asyncio.gather(*(run(runners, "", warm=False) for _ in range(4)))
    assert descriptors() == fds
    assert children() == []


async def test_many_at_once_each_with_its_own_answer(runners: Runners) -> None:
    done = await asyncio.gather(*(run(runners, f"reply = {{'n': {n}}}") for n in range(40)))
    assert [each.said[-1]["reply"]["n"] for each in done] == list(range(40))


async def test_the_fork_server_dies_and_what_it_ran_is_told_so(runners: Runners) -> None:
    started = await sleeping(runners)
    os.kill(runners.warm_pid, signal.SIGKILL)
    assert await started.ended(60)
    outcome = await started.outcome()
    assert outcome.cut == "interrupted"
    assert is_gone(started.pid)
    assert (await run(runners, "reply = {'a': 1}")).said[-1]["reply"] == {"a": 1}


async def test_the_fork_server_hangs(tmp_path: Path) -> None:
    """It takes what it is sent and answers nothing."""
    before, asked = descriptors(), tmp_path / "asked"
    hang = f"import sys, time\nif '--warm' in sys.argv: open({str(asked)!r}, 'a').write('x'); time.sleep(600)\nsys.argv = sys.argv[1:2]; exec(open(sys.argv[0]).read())"
    runners = Runners([*COMMAND[:-1], "-c", hang, COMMAND[-1]], GROUPED, fork_within_s=2.0)
    done = await run(runners, "reply = {'a': 1}")
    assert (done.said[-1]["reply"], done.run.warm) == ({"a": 1}, False)
    assert not (await run(runners, "")).run.warm
    await runners.close()
    assert not asked.exists() or asked.read_text() in ("", "x")  # no other was tried at once
    assert descriptors() == before
    assert children() == []


@pytest.mark.parametrize("code", ["sys.exit(3)", "os.write(3, b'nonsense'); import time; time.sleep(600)"])
async def test_a_fork_server_that_is_no_good(code: str) -> None:
    before = descriptors()
    bad = f"import os, sys\nif '--warm' in sys.argv: {code}\nsys.argv = sys.argv[1:2]; exec(open(sys.argv[0]).read())"
    runners = Runners([*COMMAND[:-1], "-c", bad, COMMAND[-1]], GROUPED)
    done = await run(runners, "reply = {'a': 1}")
    assert (done.said[-1]["reply"], done.run.warm) == ({"a": 1}, False)
    await runners.close()
    assert descriptors() == before
    assert children() == []


async def test_it_ends_when_it_was_idle(runners: Runners) -> None:
    runners._idle_s = 0.5
    await run(runners, "")
    started = await sleeping(runners)
    server = runners.warm_pid
    await asyncio.sleep(1.2)
    assert runners.warm_pid == server  # somebody runs
    started.kill("enough")
    await started.outcome()
    await until_gone(server)
    assert runners.warm_pid == 0
    await until(lambda: not children(), "the end of its children")
    assert (await run(runners, "reply = {'a': 1}")).run.warm


async def test_the_spare_is_used_and_made_anew(runners: Runners) -> None:
    await run(runners, "")
    for _ in range(3):
        await until_spares(runners)
        spare = runners._spares[0]
        done = await run(runners, "reply = {'pid': os.getpid()}")
        assert done.said[-1]["reply"]["pid"] == spare.pid


async def test_a_spare_that_died_is_not_used(runners: Runners) -> None:
    await run(runners, "")
    await until_spares(runners)
    for spare in runners._spares[:2]:
        os.kill(spare.pid, signal.SIGKILL)
        await until_gone(spare.pid)
        assert await spare.ended(60)
    assert (await run(runners, "reply = {'a': 1}")).said[-1]["reply"] == {"a": 1}


async def test_a_spare_that_waited_too_long_is_not_used(runners: Runners) -> None:
    """It may be leaving by itself just now: then what it is told would be lost."""
    await run(runners, "")
    await until_spares(runners)
    old = {spare.pid for spare in runners._spares}
    assert old
    for spare in runners._spares:
        spare.made -= SPARE_S
    done = await run(runners, "reply = {'pid': os.getpid()}")
    assert done.said[-1]["reply"]["pid"] not in old
    for pid in old:
        await until_gone(pid)


async def test_closing_ends_warm_runs(runners: Runners) -> None:
    started = await sleeping(runners)
    await runners.close()
    assert await started.ended(60)
    assert (await started.outcome()).cut == "interrupted"


@grouped_only
async def test_groups_come_and_go(runners: Runners) -> None:
    warm, cold = await sleeping(runners), await sleeping(runners, warm=False)
    service = await runners.start(
        request("import time; time.sleep(600)", do="serve", name="disk.usage"),
        lambda _: None,
        Path("/"),
        False,
    )
    groups = runners._groups
    assert groups is not None
    names = {Path(f"/proc/{each.pid}/cgroup").read_text().rpartition("/")[2].strip() for each in (warm, cold)}
    assert len(names) == 2
    assert all(name.startswith("job-") for name in names)
    assert Path(f"/proc/{service.pid}/cgroup").read_text().strip().endswith("/module-disk.usage")
    for each in (warm, cold, service):
        each.kill("enough")
        await each.outcome()
    await runners.close()
    assert not groups.folder.exists()


@grouped_only
async def test_a_fork_bomb_is_ended(runners: Runners) -> None:
    """Only where the kernel can end it in one stroke. It doubles until there are 256, so that other tests that run
    beside this one can still fork: those that it has left are zombies until the machine's process 1 sees to them.
    """
    code = "for _ in range(8):\n if os.fork() == 0: os.setsid()\nimport time; time.sleep(600)"
    for warm in (True, False):
        done = await run(runners, code, warm, processes=20)
        assert (done.outcome.cut, done.outcome.signal) == ("processes", 9)
    assert (await run(runners, "reply = {'a': 1}")).said[-1]["reply"] == {"a": 1}


@grouped_only
async def test_what_a_dead_agent_left_is_ended() -> None:
    """The next one does it, when it looks for its own place."""
    code = f"""
import asyncio, os, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from instar.agent.runners import Runners
from tests.agent.spawning import COMMAND, request
async def main():
    runners = Runners(COMMAND)
    run = await runners.start(request("import time; time.sleep(600)"), print, Path("/"), False)
    print(run.pid, runners._groups.folder, flush=True)
    os._exit(1)
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    pid, folder = out.decode().split()
    assert not is_gone(int(pid))  # the stand-in does not die with its parent, as a real runner does
    found = cgroups.find()
    assert found is not None
    found.open()
    await until_gone(int(pid))
    assert not Path(folder).exists()
    found.close()


# --- the real runner


async def test_selftest_by_the_real_runner(program: Program) -> None:
    before = descriptors()
    runners = Runners(program.command("runner"), GROUPED)
    for warm in (True, True, False):
        result = await run_job(SELFTEST, runners, warm=warm)
        assert result.ok, result
        assert (result.reply["nonce"], result.reply["version"]) == (NONCE, VERSION)
        assert result.reply["digest"] == program.digest
        assert (result.exit_code, result.signal, result.stderr, result.reason, result.code) == (
            0,
            0,
            "",
            "",
            "",
        )
        assert 0 < result.seconds < 20
        assert result.max_rss > 1 << 20
    await runners.close()
    assert descriptors() == before


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (Job("j", "../../etc/passwd"), "unknown-module"),
        (Job("j", "os"), "unknown-module"),
        (Job("j", "selftest", args={"nonce": "short"}), "bad-nonce"),
        (Job("j", "selftest"), "bad-nonce"),
        (Job("j", "selftest", args={"nonce": "x" * 300_000}), "bad-job"),
    ],
)
async def test_bad_jobs_are_refused(program: Program, job: Job, code: str) -> None:
    runners = Runners(program.command("runner"), grouped=False)
    result = await run_job(job, runners)
    await runners.close()
    assert (result.ok, result.code) == (False, code)
    assert result.reason


async def test_a_program_that_is_not_there() -> None:
    runners = Runners(["/does/not/exist"], grouped=False)
    result = await run_job(SELFTEST, runners)
    assert (result.ok, result.code) == (False, "no-runner")
    assert "cannot start a runner" in result.reason


async def test_memory_that_runs_are_not_charged_for(runners: Runners) -> None:
    """The agent itself does not grow with runs."""
    import resource

    for _ in range(30):
        await run(runners, "say({'log': 'x' * 100_000})")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(60):
        await run(runners, "say({'log': 'x' * 100_000})")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096
