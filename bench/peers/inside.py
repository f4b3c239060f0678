"""Runs MeshCentral's server and MeshAgents; started by `peers.meshcentral` in namespaces of its own.

It is process 1 there: whatever it started ends with it, and it ends when its standard input does. The network
holds nothing but a loopback of its own. Asked by a word a line on standard input, it answers
with one JSON object a line; the first answer, an empty one, comes unasked when the server is ready:
- `update`: a fresh agent with another digest than the server's is started, and updated by the server.
  Seconds between lines of the server's log as they arrive here: `gap` from the agent's disconnect to the
  verified connection of the new one, `whole` from the server noticing the digest to the same moment.
- `idle`: RSS in bytes of the `agent` that was updated last, and of the `server`.
"""

from __future__ import annotations

import hashlib
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from instar_lab import machine

AGENT = "agents/meshagent_x86-64"
PORT = 14443  # nobody else is in this network
READY_S = 120.0  # it makes its certificates first
WAIT_S = 30.0
SETTLE_S = 10.0
CONFIG = {
    "settings": {
        "cert": "127.0.0.1",
        "port": PORT,
        "portBind": "127.0.0.1",
        "exactPorts": True,
        "redirPort": 0,
        "mpsPort": 0,
        "WANonly": True,
    },
    "domains": {"": {"orphanAgentUser": "admin"}},  # makes the group of an agent that names an unknown one
}


class Server:
    """MeshCentral as its package starts it, with a fresh database; its debug lines tell what it sees."""

    def __init__(self, package: Path, folder: Path) -> None:
        self.data = folder / "data"
        self.data.mkdir()
        (self.data / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        self._command = ["node", str(package), "--datapath", str(self.data)]
        self._command += ["--filespath", str(folder / "files")]
        for words in (["--createaccount", "admin", "--pass", "only-Here-1"], ["--adminaccount", "admin"]):
            subprocess.run([*self._command, *words], check=True, timeout=WAIT_S, stdout=sys.stderr)
        self._lines: queue.Queue[tuple[float, str]] = queue.Queue()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [*self._command, "--debug", "agent"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.wait_for("HTTPS server running on", READY_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put((time.monotonic(), line))

    def wait_for(self, part: str, within_s: float = WAIT_S) -> float:
        """When the next line arrived that holds `part`, by the monotonic clock; earlier lines are dropped."""
        deadline = time.monotonic() + within_s
        last = "nothing"
        while True:
            try:
                at, line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise SystemExit(f"expected {part!r} within {within_s:g} s, got {last!r}") from None
            if part in line:
                return at
            last = line.strip()

    def id(self) -> str:
        """What agents know the server by: SHA-384 of its agent key."""
        certificate = x509.load_pem_x509_certificate((self.data / "agentserver-cert-public.crt").read_bytes())
        key = certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.PKCS1
        )
        return hashlib.sha384(key).hexdigest().upper()

    def rss(self) -> int:
        """Of the process that serves; the one that started it and watches it is not counted."""
        watched = str(self._process.pid)
        for seen in machine.processes():
            if seen.words[-2:] == ("--launch", watched):
                return machine.rss(seen.pid)
        raise SystemExit("expected a serving process, got none")


class Agent:
    """One at a time; each has a folder of its own, and with it an identity of its own."""

    def __init__(self, server: Server, package: Path, folder: Path) -> None:
        self.server, self.folder = server, folder
        self._current = (package / AGENT).read_bytes()
        # The compiler's mark lies in a section that is never loaded: same program, another digest.
        self._old = self._current.replace(b"GCC: (", b"gCC: (", 1)
        if self._old == self._current:
            raise SystemExit("expected a compiler's mark in the agent, got none")
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0

    def start(self, program: bytes) -> Path:
        self._started += 1
        folder = self.folder / f"agent-{self._started}"
        folder.mkdir()
        path = folder / "meshagent"
        path.write_bytes(program)
        path.chmod(0o755)
        settings = f"MeshName=bench\r\nMeshType=2\r\nMeshID=0x{'AB' * 48}\r\nServerID={self.server.id()}\r\n"
        settings += f"MeshServer=wss://127.0.0.1:{PORT}/agent.ashx\r\n"
        (folder / "meshagent.msh").write_bytes(settings.encode())
        self._process = subprocess.Popen(
            [str(path), "run"], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        return path

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(WAIT_S)
            self.server.wait_for("Agent disconnect")

    def update(self) -> dict[str, float]:
        self.end()
        path = self.start(self._old)
        noticed = self.server.wait_for("Agent update required")
        away = self.server.wait_for("Agent disconnect")
        back = self.server.wait_for("Verified agent connection")
        if path.read_bytes() != self._current:
            raise SystemExit("expected the server's program in place, got the old one back")
        return {"gap": back - away, "whole": back - noticed}

    def idle(self) -> dict[str, float]:
        assert self._process is not None
        return {"agent": machine.rss(self._process.pid), "server": self.server.rss()}


def main(package: Path, folder: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=WAIT_S)
    server = Server(package, folder)
    server.start()
    machine.pause(SETTLE_S)
    agent = Agent(server, package, folder)
    print("{}", flush=True)
    answers = {"update": agent.update, "idle": agent.idle}
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
