"""Runner processes: the good one, and hostile ones that must not harm who started them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from instar.agent.jobs import run_job
from instar.agent.spawn import STDERR_TAIL, run_child
from instar.host.program import Program
from instar.wire.messages import MAX_FRAME, Job
from tests.agent.fleet import VERSION

NONCE = "ab" * 16
JOB = Job("j-1", "selftest", args={"nonce": NONCE}, deadline_s=20.0)


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


async def test_selftest_proves_the_program(program: Program) -> None:
    result = await run_job(JOB, program.command("runner"))
    assert result.ok, result
    expected = hashlib.sha256(f"{NONCE}:{program.digest}:{VERSION}".encode()).hexdigest()
    assert result.reply == {"nonce": NONCE, "answer": expected, "version": VERSION, "digest": program.digest}
    assert (result.exit_code, result.signal, result.stderr, result.reason) == (0, 0, "", "")
    assert 0 < result.seconds < 10


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (Job("j", "../../etc/passwd"), "unknown-module"),
        (Job("j", "os"), "unknown-module"),
        (Job("j", "selftest.x"), "unknown-module"),
        (Job("j", "selftest", args={"nonce": "short"}), "bad-nonce"),
        (Job("j", "selftest"), "bad-nonce"),
    ],
)
async def test_bad_jobs_are_refused_by_the_runner(program: Program, job: Job, code: str) -> None:
    result = await run_job(job, program.command("runner"))
    assert not result.ok
    assert result.reason.endswith(f"({code})")
    assert result.exit_code == 2
    assert result.stderr


@pytest.mark.parametrize(
    "request_bytes", [b"", b"{", b"[]", b'{"module": 7}', b'{"module":"selftest","args":1}']
)
async def test_bad_requests_are_refused_by_the_runner(program: Program, request_bytes: bytes) -> None:
    outcome = await run_child(program.command("runner"), request_bytes, 20.0, MAX_FRAME)
    assert outcome.exit_code == 2
    assert json.loads(outcome.output)["error"]["code"] == "bad-job"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import os; os._exit(3)", "got exit 3 and no reply"),
        ("pass", "got exit 0 and no reply"),
        ("print('{broken')", "got exit 0 and no readable reply"),
        ("print('[]')", "got exit 0 and no readable reply"),
        ('print(\'{"ok": true, "reply": 7}\')', "got exit 0 and no readable reply"),
        ("print('{\"ok\": false}')", "got exit 0 and no readable reply"),
        ("print('[' * 100000)", "got exit 0 and no readable reply"),
        ('print(\'{"ok": true, "reply": {}}\'); raise SystemExit(1)', "got exit 1"),
        ("while True: print('x' * 65536)", "got more; it was killed"),
        ("import time; time.sleep(600)", "expected an end within 0.6 s"),
        ("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)", "it was killed"),
    ],
)
async def test_hostile_runners(code: str, reason: str) -> None:
    before = descriptors()
    began = time.monotonic()
    quick = Job("j", "any", deadline_s=0.6 if "time" in code else 20.0)
    result = await run_job(quick, python(code))
    assert not result.ok
    assert reason in result.reason
    assert time.monotonic() - began < 10
    assert descriptors() == before


async def test_only_the_tail_of_endless_errors_is_kept() -> None:
    code = "import sys\nfor n in range(200000): print('line', n, file=sys.stderr)\nsys.exit(4)"
    result = await run_job(Job("j", "any", deadline_s=20.0), python(code))
    assert result.exit_code == 4
    assert len(result.stderr) <= STDERR_TAIL
    assert result.stderr.endswith("line 199999\n")


async def test_children_of_a_runner_end_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "child"
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(mark)!r}, "w").write(str(child.pid))
"""
    result = await run_job(Job("j", "any", deadline_s=20.0), python(code))
    assert result.exit_code == 0
    pid = int(mark.read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"process {pid} is still there")


async def test_a_runner_gets_a_clean_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTAR_TEST_SECRET", "x")
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    code = """
import json, os
world = {"fds": os.listdir("/proc/self/fd"), "env": dict(os.environ), "cwd": os.getcwd(),
         "leader": os.getsid(0) == os.getpid()}
print(json.dumps({"ok": True, "reply": world}))
"""
    result = await run_job(Job("j", "any", deadline_s=20.0), python(code))
    os.close(leak)
    world: dict[str, Any] = result.reply
    assert len(world["fds"]) == 4  # 0, 1, 2, and the listing itself
    assert "INSTAR_TEST_SECRET" not in world["env"]
    assert (world["cwd"], world["leader"]) == ("/", True)


async def test_cancelling_ends_the_runner() -> None:
    before = descriptors()
    task = asyncio.create_task(
        run_job(Job("j", "any", deadline_s=60.0), python("import time; time.sleep(600)"))
    )
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert descriptors() == before


async def test_a_program_that_is_not_there() -> None:
    result = await run_job(JOB, ["/does/not/exist"])
    assert not result.ok
    assert "cannot start a runner" in result.reason
