"""Service modules in real runner processes: their life from start to stop, requests, health, state."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from instar.host.program import Program
from instar.runner.service import LEAST_STEP_S
from tests.runner.conftest import WITHIN_S, Child, MakeModule, Runner, ask
from tests.runner.test_python import gone

COUNTER = """
import os
class S: pass
s = S()

def start(context):
    s.count = (context.load() or {"count": 0})["count"]
    s.steps = 0
    s.busy_until = ""
    s.sick = ""

def request(args, context):
    do = args.get("do", "add")
    if do == "add":
        s.count += args.get("n", 1)
    elif do == "busy":
        s.busy_until = args["until"]
    elif do == "sick":
        s.sick = args["text"]
    elif do == "talk":
        context.log("asked"); context.progress(0.5)
    elif do == "raise":
        raise {"SystemExit": SystemExit, "MemoryError": MemoryError, "ValueError": ValueError}[args["what"]]("x")
    elif do == "bad":
        return {"x": object()}
    elif do == "huge":
        return {"x": "y" * args["n"]}
    elif do == "put":
        context.put("left", 1)
        raise ValueError
    elif do == "save":
        context.save({"count": s.count})
    return {"count": s.count, "steps": s.steps, "args": context.args}

def step(context):
    s.steps += 1
    return 0.02

def ready_to_stop(context):
    return not s.busy_until or os.path.exists(s.busy_until)

def stop(context):
    context.save({"count": s.count})
    context.log("stopped")

def health(context):
    return s.sick
"""


@pytest.fixture
def counter(make_module: MakeModule) -> dict[str, Any]:
    return make_module("count", {"main.py": COUNTER}, mode="service", stateful=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def service(make_module: MakeModule, source: str, name: str = "s") -> dict[str, Any]:
    return make_module(name, {"main.py": source}, mode="service")


def ready(runner: Runner, module: dict[str, Any], data: Path, **more: Any) -> Child:
    child = runner.serve(module, data, **more)
    assert child.until("state") == {"state": "starting"}
    assert child.until("state") == {"state": "ready"}
    return child


def question(child: Child, number: str, **args: Any) -> dict[str, Any]:
    child.say({"do": "request", "id": number, "args": args})
    return child.until("answer", number)


def stopped(child: Child) -> None:
    child.say({"do": "stop"})
    assert child.until("stopping", "ready")
    end = child.finish()
    assert (end.exit_code, end.signal) == (0, 0), end


def test_a_life(runner: Runner, counter: dict[str, Any], data: Path) -> None:
    for start in (0, 3):
        child = ready(runner, counter, data)
        for n in range(1, 4):
            answer = question(child, f"q-{n}", n=1)
            assert answer["ok"]
            assert answer["reply"]["count"] == start + n
            assert answer["reply"]["args"] == {"n": 1}
        stopped(child)
        assert "stopped" in [line.get("log") for line in child.lines]
        assert json.loads((data / "state.json").read_text()) == {"count": start + 3}
    assert os.listdir(data) == ["state.json"]


def test_steps_come_by_themselves(runner: Runner, counter: dict[str, Any], data: Path) -> None:
    child = ready(runner, counter, data)
    first = question(child, "a")["reply"]["steps"]
    end = time.monotonic() + WITHIN_S
    while question(child, "b")["reply"]["steps"] < first + 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    stopped(child)


def test_lines_of_a_request_carry_its_id(runner: Runner, counter: dict[str, Any], data: Path) -> None:
    child = ready(runner, counter, data)
    question(child, "q", do="talk")
    said = [line for line in child.lines if "log" in line or "progress" in line]
    assert said == [{"id": "q", "log": "asked"}, {"id": "q", "progress": 0.5, "text": ""}]
    stopped(child)
    assert child.lines[-2] == {"log": "stopped"}


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ({"do": "raise", "what": "ValueError"}, "module-failed"),
        ({"do": "raise", "what": "SystemExit"}, "module-failed"),
        ({"do": "raise", "what": "MemoryError"}, "out-of-memory"),
        ({"do": "bad"}, "bad-reply"),
        ({"do": "huge", "n": 300_000}, "bad-reply"),
        ({"do": "huge", "n": 60_000}, "too-much-output"),
        ({"do": "put"}, "module-failed"),
    ],
)
def test_a_request_that_fails_ends_nothing(
    runner: Runner, counter: dict[str, Any], data: Path, args: dict[str, Any], code: str
) -> None:
    child = ready(runner, counter, data, output=50_000)
    for n in range(2):
        answer = question(child, f"bad-{n}", **args)
        assert (answer["ok"], answer["error"]["code"]) == (False, code)
    good = question(child, "good")
    assert good["ok"]
    assert "left" not in good["reply"]
    stopped(child)


def test_lines_that_nobody_understands_are_passed_over(
    runner: Runner, counter: dict[str, Any], data: Path
) -> None:
    child = ready(runner, counter, data)
    for line in (
        b"{\n",
        b"7\n",
        b'{"do":"sing"}\n',
        b'{"do":"request"}\n',
        b'{"do":"request","id":7}\n',
        b"\n",
    ):
        child.line.sendall(line)
    child.line.sendall(b'{"do":"request","id":"a","args":7}\n')
    assert question(child, "q")["ok"]
    stopped(child)


def test_what_came_with_the_first_line_is_not_left_lying(
    runner: Runner, make_module: MakeModule, data: Path
) -> None:
    source = "def start(context): pass\ndef request(args, context): return {'x': 1}\ndef step(context): return 60.0\n"
    data.mkdir()
    first = ask(service(make_module, source), do="serve", data=str(data))
    lines = [first, {"do": "request", "id": "q"}, {"do": "stop"}]
    child = runner.start(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    child.until("state", "ready")
    assert child.until("answer", "q", within_s=4.0)["ok"]  # it looks around every five seconds
    assert child.until("stopping", "ready", within_s=4.0)
    assert child.finish().exit_code == 0


def test_many_requests_at_once_are_answered_in_order(
    runner: Runner, counter: dict[str, Any], data: Path
) -> None:
    child = ready(runner, counter, data)
    for n in range(500):
        child.say({"do": "request", "id": f"q-{n}"})
    answers = [child.until("answer") for _ in range(500)]
    assert [answer["answer"] for answer in answers] == [f"q-{n}" for n in range(500)]
    assert answers[-1]["reply"]["count"] == 500
    stopped(child)


def test_health_is_told_when_it_changes(runner: Runner, counter: dict[str, Any], data: Path) -> None:
    child = ready(runner, counter, data)
    question(child, "a", do="sick", text="the disk is gone")
    assert child.until("state") == {"state": "failed", "text": "the disk is gone"}
    question(child, "b")
    question(child, "c", do="sick", text="")
    assert child.until("state") == {"state": "ok"}
    stopped(child)
    assert len([line for line in child.lines if "state" in line]) == 4


# --- the stop


def test_one_that_is_busy_is_waited_for(runner: Runner, counter: dict[str, Any], data: Path) -> None:
    child, done = ready(runner, counter, data), data.parent / "done"
    question(child, "a", do="busy", until=str(done))
    began = time.monotonic()
    child.say({"do": "stop"})
    child.say({"do": "stop"})
    assert child.until("stopping")["stopping"] == "busy"
    late = question(child, "late")
    assert (late["ok"], late["error"]["code"]) == (False, "stopping")
    assert child.until("stopping")["stopping"] == "busy"
    assert time.monotonic() - began >= 1.0  # once a second, and not once more for the second stop
    done.touch()
    child.until("stopping", "ready")
    end = child.finish()
    assert end.exit_code == 0
    assert json.loads((data / "state.json").read_text()) == {"count": 0}


@pytest.mark.parametrize("how", ["line", "term"])
def test_the_end_of_the_line_and_sigterm_mean_stop(
    runner: Runner, counter: dict[str, Any], data: Path, how: str
) -> None:
    child = ready(runner, counter, data)
    question(child, "a", n=5)
    if how == "line":
        child.line.shutdown(1)
    else:
        os.kill(child.pid, signal.SIGTERM)
    end = child.finish()
    assert (end.exit_code, end.signal) == (0, 0)
    assert json.loads((data / "state.json").read_text()) == {"count": 5}


def test_state_is_saved_when_the_agent_is_killed(
    program: Program, counter: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    """The kernel's parent-death signal, and the line's end, say it; the process is gone soon, its state is there."""
    data.mkdir()
    request = ask(counter, do="serve", data=str(data)) | {"cwd": str(data)}
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import json, os, socket, subprocess, sys\n"
        "a, b = socket.socketpair()\n"
        "p = subprocess.Popen(json.loads(sys.argv[1]), preexec_fn=lambda: os.dup2(b.fileno(), 3), pass_fds=[3],\n"
        "                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)\n"
        "b.close()\n"
        "say = lambda m: a.sendall(json.dumps(m).encode() + b'\\n')\n"
        "say(json.loads(sys.argv[2])); say({'do': 'request', 'id': 'q', 'args': {'n': 7}})\n"
        "text = b''\n"
        "while b'answer' not in text: text += a.recv(65536)\n"
        "print(p.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    import subprocess
    import sys

    command = [sys.executable, str(starter), json.dumps(program.command("runner")), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert gone(int(done.stdout))
    assert json.loads((data / "state.json").read_text()) == {"count": 7}


def test_a_step_that_does_not_come_back_is_killed(
    runner: Runner, make_module: MakeModule, data: Path
) -> None:
    source = "import time\ndef start(context): pass\ndef request(args, context): return {}\ndef step(context):\n    context.log('in')\n    time.sleep(600)\n"
    child = ready(runner, service(make_module, source), data)
    child.until("log")
    child.say({"do": "stop"})
    time.sleep(0.2)
    child.kill()
    end = child.finish()
    assert (end.signal, end.said("stopping")) == (9, [])


# --- modules that fail

FAILING = {
    "start": ("raise ValueError('x')", "module-failed"),
    "start-exit": ("raise SystemExit(0)", "module-failed"),
    "start-memory": ("bytearray(1 << 30)", "out-of-memory"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_start_that_fails(runner: Runner, make_module: MakeModule, data: Path, case: str) -> None:
    line, code = FAILING[case]
    module = service(make_module, f"def start(context): {line}\ndef request(args, context): return {{}}\n")
    for do in ("serve", "check"):
        data.mkdir(exist_ok=True)
        end = runner.start(ask(module, do=do, data=str(data)), cwd=data).finish()
        assert (end.code, end.exit_code) == (code, 1)
        states = [line["state"] for line in end.lines if "state" in line]
        assert states == (["starting", "failed"] if do == "serve" else [])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raise ValueError('x')", "ValueError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("return 'soon'", "seconds"),
        ("return float('nan')", "seconds"),
        ("return True", "seconds"),
    ],
)
def test_a_step_that_fails_ends_the_service(
    runner: Runner, make_module: MakeModule, data: Path, line: str, words: str
) -> None:
    source = f"def start(context): pass\ndef request(args, context): return {{}}\ndef step(context): {line}\n"
    end = runner.serve(service(make_module, source), data).finish()
    assert (end.code, end.exit_code) == ("module-failed", 1)
    assert words in end.answer["error"]["text"]
    assert [line["state"] for line in end.lines if "state" in line] == ["starting", "ready", "failed"]


@pytest.mark.parametrize("wish", ["-1", "0", "0.0", "float('-inf')"])
def test_a_step_that_wants_to_be_called_at_once_does_not_spin(
    runner: Runner, make_module: MakeModule, data: Path, wish: str
) -> None:
    source = f"n = 0\ndef start(context): pass\ndef request(args, context): return {{'n': n}}\ndef step(context):\n    global n\n    n += 1\n    return {wish}\n"
    began = time.monotonic()
    child = ready(runner, service(make_module, source), data)
    while (n := question(child, "q")["reply"]["n"]) <= 2 or time.monotonic() - began < 0.3:
        time.sleep(0.1)
    assert n <= (time.monotonic() - began) / LEAST_STEP_S
    stopped(child)


def test_a_service_without_the_optional_functions(
    runner: Runner, make_module: MakeModule, data: Path
) -> None:
    source = "def start(context): pass\ndef request(args, context): return {'x': 1}\n"
    child = ready(runner, service(make_module, source), data)
    assert question(child, "q")["reply"] == {"x": 1}
    before = cpu(child.pid)
    time.sleep(0.3)
    assert cpu(child.pid) - before <= 2  # it waits, and does not spin
    stopped(child)


def test_a_stop_or_a_question_that_raises(runner: Runner, make_module: MakeModule, data: Path) -> None:
    source = "def start(context): pass\ndef request(args, context): return {}\n"
    asks = (
        source
        + "def ready_to_stop(context): raise ValueError('r')\ndef health(context): raise ValueError('h')\n"
    )
    child = ready(runner, service(make_module, asks), data)
    assert "ValueError: h" in child.until("state", "failed")["text"]
    stopped(child)
    child = ready(
        runner, service(make_module, source + "def stop(context): raise ValueError('s')\n", "t"), data
    )
    child.say({"do": "stop"})
    end = child.finish()
    assert (end.code, end.exit_code) == ("module-failed", 1)
    assert end.said("stopping") == []


def test_a_service_that_closes_the_line(runner: Runner, make_module: MakeModule, data: Path) -> None:
    source = "import os\ndef start(context): pass\ndef request(args, context): return {}\ndef step(context): os.close(3)\n"
    end = ready(runner, service(make_module, source), data).finish()
    assert (end.answer, end.exit_code) == ({}, 1)
    assert "closed the runner's control line" in end.stderr


def test_what_it_prints_is_out_at_once(runner: Runner, make_module: MakeModule, data: Path) -> None:
    source = "def start(context): print('begun', end='')\ndef request(args, context): return {}\n"
    child = ready(runner, service(make_module, source), data)
    question(child, "q")
    assert child.drain() == "begun"
    stopped(child)


# --- rehearsal


def test_check_starts_and_stops(runner: Runner, counter: dict[str, Any], data: Path) -> None:
    data.mkdir()
    (data / "state.json").write_text('{"count": 4}')
    end = runner.start(ask(counter, do="check", data=str(data)), cwd=data).finish()
    assert end.reply == {}
    assert end.exit_code == 0
    assert json.loads((data / "state.json").read_text()) == {"count": 4}


def test_check_of_a_oneshot_module_only_loads(runner: Runner, make_module: MakeModule) -> None:
    module = make_module("one", {"main.py": "def run(args, context): raise ValueError\n"})
    assert runner.start(ask(module, do="check")).finish().reply == {}


def test_a_mode_is_kept_to(runner: Runner, counter: dict[str, Any], make_module: MakeModule) -> None:
    assert runner.start(ask(counter, do="run")).finish().code == "bad-job"
    one = make_module("one", {"main.py": "def run(args, context): return {}\n"})
    assert runner.start(ask(one, do="serve")).finish().code == "bad-job"


def cpu(pid: int) -> int:
    """Clock ticks that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
