"""Runs Salt's master and minions; started by `peers.salt` with Salt's own interpreter in namespaces of its own.

It is process 1 there, and whatever it started ends with it. Nothing of this repository is imported: the
interpreter is Salt's. Asked by a word a line on standard input, it answers with one JSON object a line; the
first answer, an empty one, comes unasked when the first minion answers:
- `one`: `seconds` of a test.ping of one minion, by Salt's own LocalClient.
- `grow`: starts all the other minions; `count` of those that answer.
- `all`: `seconds` of a test.ping of all of them, and the `count` that answered.
- `restart`: TERM to one minion, its end, its start by the same command; `seconds` until it answers a test.ping.
  `lost`: how many of the three jobs that were `sent` meanwhile (0.2 s after the TERM, at its end, 1 s after the
  start) have no answer 5 s after that.
- `idle`: RSS in bytes of one `minion` with its children, and of the `master` with its own.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

READY_S = 120.0
WAIT_S = 60.0
PING_S = 20.0
MASTER = """\
interface: 127.0.0.1
user: root
root_dir: {root}
auto_accept: True
enable_ssh_minions: False
"""
MINION = """\
id: m{number}
user: root
root_dir: {root}
master: 127.0.0.1
enable_fqdns_grains: False
master_alive_interval: 0
"""


def write(folder: Path, name: str, text: str) -> Path:
    """A configuration folder with everything that Salt would put below / put below `folder` instead."""
    settings = folder / "etc/salt"
    settings.mkdir(parents=True)
    (settings / name).write_text(text.format(root=folder, number=folder.name[1:]), encoding="utf-8")
    return settings


def start(program: str, settings: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", str(Path(sys.executable).with_name(program)), "-c", str(settings)]
    return subprocess.Popen([*command, "-l", "error"], stdin=subprocess.DEVNULL, stdout=sys.stderr)


class Hall:
    """The master, its minions and a client."""

    def __init__(self, folder: Path, minions: int) -> None:
        self.folder, self.size = folder, minions
        self.settings: list[Path] = []
        self.minions: list[subprocess.Popen[bytes]] = []
        settings = write(folder / "master", "master", MASTER)
        self.master = start("salt-master", settings)
        self._wait_for_master()
        self.client: Any = importlib.import_module("salt.client").LocalClient(str(settings / "master"))
        self.add()
        self._wait_until(lambda: self.ping("m0", 5) == 1, "the first minion to answer")

    def _wait_for_master(self) -> None:
        sockets = self.folder / "master/var/run/salt/master"
        self._wait_until((sockets / "publish_pull.ipc").exists, "the master to listen")

    def _wait_until(self, look: Any, what: str) -> None:
        deadline = time.monotonic() + READY_S
        while not look():
            if self.master.poll() is not None or time.monotonic() >= deadline:
                raise SystemExit(f"expected {what} within {READY_S:g} s, got none")
            time.sleep(0.1)

    def add(self) -> None:
        folder = self.folder / f"m{len(self.minions)}"
        self.settings.append(write(folder, "minion", MINION))
        self.minions.append(start("salt-minion", self.settings[-1]))

    def ping(self, target: str, timeout: float = PING_S) -> int:
        """How many answered."""
        answers = self.client.cmd(target, "test.ping", timeout=timeout)
        return sum(value is True for value in answers.values())

    # --- words

    def one(self) -> dict[str, float]:
        return self._timed("m0", 1)

    def all(self) -> dict[str, float]:
        return self._timed("*", len(self.minions))

    def _timed(self, target: str, expected: int) -> dict[str, float]:
        began = time.perf_counter()
        count = self.ping(target)
        seconds = time.perf_counter() - began
        if count != expected:
            raise SystemExit(f"expected {expected} answers, got {count}")
        return {"seconds": seconds, "count": count}

    def grow(self) -> dict[str, float]:
        while len(self.minions) < self.size:
            self.add()
            time.sleep(1.0)  # all at once would be slower
        self._wait_until(lambda: self.ping("*", 10) == self.size, f"{self.size} minions to answer")
        return {"count": self.size}

    def restart(self) -> dict[str, float]:
        events = importlib.import_module("salt.utils.event").get_event(
            "master", sock_dir=self.client.opts["sock_dir"], opts=self.client.opts, listen=True
        )
        began = time.perf_counter()
        self.minions[0].terminate()
        time.sleep(0.2)
        jobs = [self._send()]
        self.minions[0].wait(WAIT_S)
        jobs.append(self._send())
        self.minions[0] = start("salt-minion", self.settings[0])
        time.sleep(1.0)
        jobs.append(self._send())
        while time.perf_counter() - began < WAIT_S:
            event = events.get_event(wait=1, full=True)
            if event and event["tag"] == "salt/minion/m0/start":
                break
        while self.ping("m0", 5) != 1:
            if time.perf_counter() - began >= WAIT_S:
                raise SystemExit(f"expected the minion back within {WAIT_S:g} s, got no answer")
        seconds = time.perf_counter() - began
        time.sleep(5.0)
        lost = sum("m0" not in self.client.get_cache_returns(job) for job in jobs)
        return {"seconds": seconds, "lost": lost, "sent": len(jobs)}

    def _send(self) -> str:
        """A job that nobody waits for; its number."""
        return str(self.client.run_job("m0", "test.ping", timeout=1)["jid"])

    def idle(self) -> dict[str, float]:
        return {"minion": memory(self.minions[0].pid), "master": memory(self.master.pid)}


def memory(pid: int) -> float:
    """RSS in bytes of a process and all that came from it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(memory(int(child)) for child in children)


def main(folder: Path, minions: int) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what Salt prints while it works is no answer
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=WAIT_S)
    hall = Hall(folder, minions)
    print("{}", file=answers, flush=True)
    words = {"one": hall.one, "grow": hall.grow, "all": hall.all, "restart": hall.restart, "idle": hall.idle}
    for line in sys.stdin:
        print(json.dumps(words[line.strip()]()), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
