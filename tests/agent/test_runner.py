"""Jobs in real runner processes of the real program: what the agent makes of how each of them ended."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from instar.agent.runners import Runners
from instar.agent.running import run_job
from instar.agent.shelf import Module
from instar.host.program import Program
from instar.trust.module import ModuleManifest, module_digest
from instar.wire.messages import Job, Result
from tests.agent.fleet import VERSION
from tests.agent.spawning import children, descriptors

NONCE = "ab" * 16
SELFTEST = Job("j-1", "selftest", args={"nonce": NONCE}, deadline_s=20.0)


@pytest.fixture
async def runners(program: Program) -> AsyncIterator[Runners]:
    made = Runners(program.command("runner"))
    yield made
    await made.close()


def module(folder: Path, source: str, **limits: int) -> Module:
    """A one-shot Python module as the shelf hands it over."""
    data = source.encode()
    file = {"path": "main.py", "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "mode": "0644"}
    raw = {"format": 1, "kind": "module", "name": "test.one", "version": "1.0.0", "runs": "python"}
    raw |= {"mode": "oneshot", "entry": {"any": "main.py"}, "files": [file], "limits": limits}
    text = json.dumps(raw).encode()
    (folder / "main.py").write_bytes(data)
    return Module(ModuleManifest.decode(text), folder, module_digest(text), "1.0.0-x")


async def run(runners: Runners, folder: Path, line: str, deadline_s: float = 20.0, **limits: int) -> Result:
    source = f"import os, sys, time, signal\ndef run(args, context):\n    {line}\n"
    job = Job("j-2", "test.one", args={"a": 1}, deadline_s=deadline_s)
    return await run_job(job, runners, folder, module(folder, source, **limits))


@pytest.mark.parametrize("warm", [False, True])
async def test_selftest_proves_the_program(runners: Runners, program: Program, warm: bool) -> None:
    result = await run_job(SELFTEST, runners, warm=warm)
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
async def test_bad_jobs_are_refused_by_the_runner(runners: Runners, job: Job, code: str) -> None:
    result = await run_job(job, runners)
    assert (result.ok, result.code, result.exit_code) == (False, code, 2)
    assert result.stderr


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("return {'a': args['a']}", "", {}),
    ("os.kill(os.getpid(), 11)", "signal", {}),
    ("os.abort()", "signal", {}),
    ("os._exit(3)", "failed", {}),
    ("os._exit(0)", "failed", {}),
    ("sys.exit(0)", "module-failed", {}),
    ("raise ValueError('why')", "module-failed", {}),
    ("return 7", "bad-reply", {}),
    ("return {'x': float('nan')}", "bad-reply", {}),
    ("os.write(3, b'{broken\\n[]\\n'); return {}", "", {}),
    ("os.write(3, b'[' * 300000); return {}", "output", {}),
    ("os.closerange(3, 100); return {}", "failed", {}),
    ("return {'x': 'y' * 5000}", "too-much-output", {"output": 4000}),
    ("[context.log('x' * 1000) for _ in range(100)]", "too-much-output", {"output": 4000}),
    ("while True: os.write(3, b'x' * 1000 + b'\\n')", "output", {"output": 40_000}),
    ("while True: print('x' * 60000)", "output", {}),
    ("x = b'x' * (100 << 20); return {}", "out-of-memory", {"memory": 64 << 20}),
    ("while True: pass", "signal", {"cpu_s": 1}),
    ("time.sleep(600)", "deadline", {"deadline_s": 0.5}),
    ("[signal.signal(n, 1) for n in range(1, 32) if n not in (9, 19)]; time.sleep(600)", "deadline", {"deadline_s": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "more"), CASES)
async def test_how_it_ended_is_the_result(
    runners: Runners, tmp_path: Path, line: str, code: str, more: dict[str, Any]
) -> None:
    began = time.monotonic()
    result = await run(runners, tmp_path, line, **more)
    assert (result.ok, result.code) == (not code, code), result
    assert time.monotonic() - began < 15
    assert result.max_rss > 0
    again = await run(runners, tmp_path, "return {'n': 1}")
    assert again.reply == {"n": 1}


async def test_nothing_is_left_of_many(program: Program, tmp_path: Path) -> None:
    before = descriptors()
    runners = Runners(program.command("runner"))
    for line in ("return {}", "os._exit(3)", "os.fork() or time.sleep(600)", "os.kill(0, 9)") * 5:
        await run(runners, tmp_path, line)
    await runners.close()
    assert descriptors() == before
    assert children() == []


async def test_cancelling_ends_the_runner(runners: Runners, tmp_path: Path) -> None:
    task = asyncio.create_task(run(runners, tmp_path, "open('in', 'w'); time.sleep(600)"))
    for _ in range(500):
        if (tmp_path / "in").exists():
            break
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await run(runners, tmp_path, "return {'n': 1}")).ok


async def test_a_program_that_is_not_there() -> None:
    runners = Runners(["/does/not/exist"])
    result = await run_job(SELFTEST, runners)
    assert (result.ok, result.code) == (False, "no-runner")
    await runners.close()
