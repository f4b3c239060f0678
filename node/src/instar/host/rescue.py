"""The recovery core: found, checked, and started so that it outlives the agent that it will replace.

A core comes as a parcel of the kind `recovery` (host/parcel.py). It is copied out of there first, so that
what is verified is what runs, whatever comes in meanwhile. Each has a file of its own, for one that runs reads
its file as it goes on:

    <state>/run/recovery/core-<sha256[:12]>.pyz order.json

Under systemd it runs as a unit of its own, for everything in the agent's unit ends with the agent;
elsewhere in a session of its own. The agent uses all this from a thread, the launcher's beacon as it is.

Import diet: bare standard library, `core`, `wire`, `host`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, MachineError, TrustError
from instar.core.releases import Release
from instar.host import children, processes
from instar.host.clock import Clock
from instar.host.files import failed, make_folder, write_atomic
from instar.host.incoming import Incoming
from instar.host.interpreter import FLAGS
from instar.host.layout import LINES, Layout
from instar.host.parcel import CHUNK, Parcel
from instar.host.points import reach
from instar.host.services.base import NoAnswerError, RoleLockProbe, call
from instar.host.services.systemd import in_unit
from instar.wire.messages import AgentUpdate, AgentUpdateDownloaded, AgentUpdateEnded, AgentUpdateProgress

ROLE = "recovery"  # of its process record
UNIT = "instar-recovery.service"  # one at a time: systemd refuses a second one
WITHIN_S = 900.0  # for the whole recovery
VERIFY_WITHIN_S = 60.0
CALL_S = 10.0
TRIES, PAUSE_S = 3, 1.0  # for a systemctl that fails at once
NOT_ACTIVE = (0, 3, 4)  # its exit statuses that are an answer
AT_WORK = ("active", "activating", "deactivating", "reloading")
END_S = 10.0  # for a core that is told to stop: it gives the updater's role back
MOST_LINE = 65_536  # bytes of one line that a core says
TAIL = 1_000  # characters of its stderr that are told
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
RUNNING_SYSTEMD = Path("/run/systemd/system")

HEX = re.compile(r"[0-9a-f]{96}", re.ASCII)
URL = re.compile(r"(?:https://|/)[!-~]{1,2000}", re.ASCII)
TARGET = re.compile(r"node/[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
DECIDED = ("trust", "expired", "stale", "absent")  # kinds of verify's answers that no other program changes

Word = AgentUpdateProgress | AgentUpdateDownloaded | AgentUpdateEnded


def check_order(order: AgentUpdate) -> None:
    """Raises InputError `bad-order` naming what is wrong."""
    wrong = ""
    if not 0 < len(order.id) <= 200:
        wrong = f"an id of 1 to 200 characters, got {len(order.id)}"
    elif not URL.fullmatch(order.url):
        wrong = f"a url of https:// or a path, got {order.url[:80]!a}"
    elif not HEX.fullmatch(order.sha384) or not HEX.fullmatch(order.core):
        wrong = "sha384 and core as 96 hexadecimal digits, got another form"
    elif not TARGET.fullmatch(order.target) or ".." in order.target:
        wrong = f"a target below node/, got {order.target[:80]!a}"
    elif not order.lines or len(set(order.lines)) != len(order.lines) or not set(order.lines) <= set(LINES):
        wrong = f"lines of {', '.join(LINES)}, each once, got {order.lines!a:.80}"
    if wrong:
        raise InputError("bad-order", f"cannot recover: expected {wrong}")
    try:
        Release(order.version, order.digest)
    except InputError as error:
        raise InputError("bad-order", error.text) from None


def prepare(
    layout: Layout, order: AgentUpdate, programs: Iterable[Path], pin: str, server: str
) -> tuple[Path, Path]:
    """(the core, its order), both ready in a folder of their own. Takes seconds: a child verifies the core.

    `programs` are asked in turn whether the core is signed, until one can tell. `pin` is the SHA-256 of the
    channel's server certificate, `server` its address, https://host:port. Raises MachineError (`no-core`,
    `cannot-verify`, …) or TrustError; then there is no core to run.
    """
    parcel = Incoming(layout.incoming).of_sha384(order.core)
    if parcel is None or parcel.kind != "recovery":
        raise MachineError("no-core", f"cannot recover: the core {order.core[:12]} is not on this node")
    folder = layout.run / "recovery"
    make_folder(folder, 0o700)
    new, file = folder / "core.new", folder / "order.json"
    try:
        found = _copy(parcel.archive, new)
        verify(layout, parcel, found, programs)
        core = folder / f"core-{found[1][:12]}.pyz"
        os.rename(new, core)  # over none but the very same bytes
    except OSError as error:
        new.unlink(missing_ok=True)
        raise failed("copy", parcel.archive, error) from error
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    body = {
        "v": 1,
        "id": order.id,
        "url": order.url,
        "sha384": order.sha384,
        "version": order.version,
        "digest": order.digest,
        "target": order.target,
        "lines": order.lines,
        "pin": pin,
        "server": server,
    }
    write_atomic(file, json.dumps(body).encode(), 0o600)
    return core, file


def verify(layout: Layout, parcel: Parcel, found: tuple[int, str], programs: Iterable[Path]) -> None:
    """Raises TrustError unless the parcel's target is signed as a recovery core with this length and SHA-256.

    A program that cannot tell (it is damaged, or too old for the question) leaves it to the next.
    Raises MachineError `cannot-verify` when none could tell.
    """
    arguments = ["--state", str(layout.state), "--target", parcel.target, "--from", str(parcel.metadata)]
    last = "no program to ask"
    for program in programs:
        ended = children.run_program(program, ["verify", *arguments], VERIFY_WITHIN_S)
        answer = _answer(ended.stdout)
        if answer.get("ok") is True:
            _compare(answer, parcel, found)
            return
        error = answer.get("error")
        told = error if isinstance(error, dict) else {}
        if answer.get("kind") in DECIDED:
            raise TrustError(str(told.get("code"))[:64], str(told.get("text"))[:500])
        last = str(told.get("text") or ended.describe(str(program)))[:500]
    raise MachineError("cannot-verify", f"cannot verify the recovery core: {last}")


def _answer(stdout: bytes) -> dict[str, Any]:
    try:
        body = json.loads(stdout)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _compare(answer: dict[str, Any], parcel: Parcel, found: tuple[int, str]) -> None:
    try:
        target = answer["target"]
        signed = (target["length"], target["hashes"]["sha256"])
        kind = target["custom"]["kind"]
    except (KeyError, TypeError) as error:
        raise MachineError("cannot-verify", f"cannot verify the recovery core: no {error} told") from None
    if kind != "recovery":
        raise TrustError("altered-core", f"cannot use {parcel.target}: it is signed as {kind!a:.40}")
    if signed != found:
        text = f"cannot use {parcel.target}: expected {signed[0]} bytes, SHA-256 {signed[1]!s:.12}…"
        raise TrustError("altered-core", f"{text}, got {found[0]}, {found[1][:12]}…")


def _copy(source: Path, into: Path) -> tuple[int, str]:
    """(length, SHA-256) of what was copied. Not synced: it runs now, or never."""
    digest, length = hashlib.sha256(), 0
    try:
        with contextlib.suppress(FileNotFoundError):
            into.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with (
            open(os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb", buffering=0) as read,
            open(os.open(into, flags, 0o600), "wb") as written,
        ):
            while chunk := read.read(CHUNK):
                digest.update(chunk)
                length += len(chunk)
                written.write(chunk)
    except OSError as error:
        raise failed("copy", source, error) from error
    return length, digest.hexdigest()


class Core:
    """A running one. `stdout` and `stderr` are pipes to read; who takes them closes them.

    When their reader is gone the core goes on: it was started to outlive us.
    """

    def __init__(self, process: subprocess.Popen[bytes], in_own_unit: bool, stdout: int, stderr: int) -> None:
        self._process, self._in_own_unit = process, in_own_unit
        self.stdout, self.stderr = stdout, stderr

    @property
    def pid(self) -> int:
        """Of the core, or of who waits for its unit."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, negative for a signal, once it has ended."""
        return self._process.poll()

    def kill(self) -> None:
        """End it and all of its unit or session, at once. Waits for the unit's manager, at most CALL_S."""
        if self._in_own_unit:
            with contextlib.suppress(MachineError):
                call(["systemctl", "kill", "--signal=KILL", UNIT], "end the recovery core", CALL_S)
        for pid in [self.pid, *_session(self.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def start(layout: Layout, core: Path, order: Path, clock: Clock, within_s: float = WITHIN_S) -> Core:
    """Run `core`. Raises MachineError `recovery-running` while another one runs, or `cannot-run`."""
    own_unit = check_idle(layout, clock)
    _drop_others(layout, core)
    words = [sys.executable, *FLAGS, str(core), "--state", str(layout.state), "--order", str(order)]
    running = _spawn(_as_unit(words, within_s) if own_unit else words, own_unit)
    reach("recovery:started")
    if not own_unit:
        started = processes.start_time(running.pid) or 0
        with contextlib.suppress(MachineError):  # a full disk must not stop a recovery
            processes.record(layout.process(ROLE), processes.Process(running.pid, started, clock.boot_id()))
    return running


def check_idle(layout: Layout, clock: Clock) -> bool:
    """See that no core runs. Returns whether one would run in a unit of its own.

    Raises MachineError `recovery-running`.
    """
    if is_running(layout, clock):
        raise MachineError("recovery-running", "cannot recover: a recovery core runs already")
    return RUNNING_SYSTEMD.is_dir() and in_unit(Path("/proc/self"), "agent") is not None


def _drop_others(layout: Layout, core: Path) -> None:
    """Remove the files of cores that were here before. None of them runs."""
    for path in (layout.run / "recovery").glob("core*.pyz"):
        if path != core:
            with contextlib.suppress(OSError):
                path.unlink()


def _spawn(words: list[str], own_unit: bool) -> Core:
    ends = [os.pipe2(os.O_CLOEXEC) for _ in ("stdout", "stderr")]
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=ends[0][1],
            stderr=ends[1][1],
            cwd="/",
            env=ENVIRONMENT,
            start_new_session=True,
        )
    except OSError as error:
        for read, _ in ends:
            os.close(read)
        raise MachineError("cannot-run", f"cannot start the recovery core: {error}") from None
    finally:
        for _, write in ends:
            os.close(write)
    return Core(process, own_unit, ends[0][0], ends[1][0])


def is_running(layout: Layout, clock: Clock) -> bool:
    """Whether a core runs, whoever started it, and wherever: in a unit of its own or in a session.

    It holds a lock from its first moment on; before that, its record or its unit tells. What cannot be told
    is a yes: a core that is not started now is started at the next order.
    """
    lock = layout.role_lock("rescue")
    try:
        if RoleLockProbe(lock).held():
            return True
    except OSError:  # out of descriptors, or there is no place for a lock yet
        if lock.exists():
            return True
    recorded = processes.recorded(layout.process(ROLE))
    if recorded is not None and processes.alive(recorded, clock.boot_id()):
        return True
    return RUNNING_SYSTEMD.is_dir() and unit_runs()


def unit_runs(within_s: float = CALL_S) -> bool:
    """Whether systemd has the unit of a core at work; True when systemd does not answer in time.

    systemd is deaf for a moment when it is updated itself: it is asked again then. Where it cannot be asked
    at all, nothing was started by it: a core that was has its lock by now.
    """
    for left in reversed(range(TRIES)):
        try:
            words = ["systemctl", "is-active", UNIT]
            said = call(words, "look for a recovery core", within_s, NOT_ACTIVE)
            return said.partition("\n")[0].strip() in AT_WORK
        except NoAnswerError:
            return True
        except MachineError:
            if left:
                time.sleep(PAUSE_S)
    return False


def end(layout: Layout, clock: Clock, own_unit: bool) -> None:
    """End a core that runs, with what it has started: what it was at is left as it is. Absent is fine.

    Raises MachineError `not-gone` when even KILL does not end it.
    """
    if own_unit:
        with contextlib.suppress(MachineError):  # not loaded: none runs
            call(["systemctl", "stop", UNIT], "end the recovery core", END_S)
    if (recorded := processes.recorded(layout.process(ROLE))) is not None:
        family = _session(recorded.pid) if processes.alive(recorded, clock.boot_id()) else []
        processes.stop(recorded, clock.boot_id(), END_S)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _as_unit(words: list[str], within_s: float) -> list[str]:
    """It gets our pipes as they are, and stays when whoever waits for it is killed."""
    return [
        "systemd-run",
        "--pipe",
        "--wait",
        "--collect",
        "--quiet",
        f"--unit={UNIT}",
        "--description=Instar recovery core",
        f"--property=RuntimeMaxSec={within_s:g}",
        *(f"--setenv={name}={value}" for name, value in ENVIRONMENT.items()),
        "--",
        *words,
    ]


def _session(leader: int) -> list[int]:
    """The processes of the session that `leader` made."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.getsid(int(name)) == leader and int(name) != leader:
                    found.append(int(name))
    return found


# --- what a core says


def heard(order_id: str, line: bytes) -> Word | None:
    """The message for one line that a core said; None for what is none."""
    body = _answer(line)
    progress, downloaded, ended = (body.get(key) for key in ("progress", "downloaded", "ended"))
    if isinstance(progress, dict):
        phase, text = str(progress.get("phase", ""))[:64], str(progress.get("text", ""))[:300]
        return AgentUpdateProgress(order_id, phase, _percent(progress.get("percent")), text)
    if isinstance(downloaded, str) and HEX.fullmatch(downloaded):
        return AgentUpdateDownloaded(order_id, downloaded)
    if isinstance(ended, dict):
        code, text = str(ended.get("code", ""))[:64], str(ended.get("text", ""))[:500]
        return AgentUpdateEnded(order_id, ended.get("ok") is True, code, text)
    return None


def _percent(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 100:
        return float(value)
    return -1.0


def outcome(
    order_id: str, status: int, ended: AgentUpdateEnded | None, stderr: str, late: bool
) -> AgentUpdateEnded:
    """The last word: the core's own where it has one and its exit status agrees."""
    if ended is not None and ended.ok and status == 0:
        return ended
    code, text = (ended.code, ended.text) if ended and not ended.ok else ("", "")
    if late:
        code, text = "deadline", "it did not end in time and was killed"
    elif not text:
        how = f"status {status}" if status >= 0 else processes.signal_name(-status)
        code, text = code or "core-failed", f"the recovery core ended with {how}"
    tail = stderr.strip()[-TAIL:]
    return AgentUpdateEnded(order_id, False, code, f"{text}\n{tail}" if tail else text)
