"""A real server in a scratch folder, with its own keys, run as a process of its own and steered by its API.

The key ceremony and the signing of releases use the same functions as `instarctl keys` and `instarctl
release`, without their processes: seven releases would otherwise cost some ten seconds of start-up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner

from instar.core.errors import MachineError, ServerRefused
from instar_lab import machine, modules
from instar_lab.program import build
from instar_server.ctl.client import Access, Client
from instar_server.settings import Layout
from instar_server.trust import keys, offline
from instar_server.trust.bundle import Built
from instar_server.trust.pack import Release, pack_recovery, pack_release

START_S = 90.0
STOP_S = 30.0
HOLDERS, THRESHOLD = 3, 2  # keys of root and targets, and how many of them must sign
PASSPHRASE = b"lab only: opens nothing of value"
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """A node as the server shows it. `agent` and `updater` are program digests, '' when never seen."""

    id: str
    state: str
    agent: str
    updater: str
    connected_since: float  # unix time; 0 when it is not connected


class LabServer:
    """`folder` holds the server's data, the offline keys and the log. Not safe for use by several threads.

    `host` is the address by which nodes reach it: another one than ours where they live in a machine of their own.
    """

    def __init__(self, folder: Path, host: str = HOST) -> None:
        self.folder, self.host = folder, host
        self.layout = Layout(folder / "data")
        self.log = folder / "server.log"
        self._signers: dict[str, list[CryptoSigner]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, Any] = {}
        self._client: Client | None = None

    # --- life

    def create(self) -> None:
        """Make all keys, the first root and targets metadata, and the server's folder."""
        self.folder.mkdir(parents=True)
        offline_folder, online_folder = self.folder / "keys", self.folder / "online"
        public: dict[str, list[Any]] = {}
        for role in ("root", "targets"):
            for number in range(1, HOLDERS + 1):
                key = keys.generate(offline_folder, f"{role}-{number}", PASSPHRASE)
                public.setdefault(role, []).append(key)
            paths = (offline_folder / f"{role}-{number}.key" for number in range(1, THRESHOLD + 1))
            self._signers[role] = [keys.load(path, lambda _: PASSPHRASE) for path in paths]
        roles = {role: offline.RoleKeys(held, THRESHOLD) for role, held in public.items()}
        roles |= {
            role: offline.RoleKeys([key], 1) for role, key in keys.generate_online(online_folder).items()
        }
        root = self._signed(offline.first_root(roles, in_days(365)), "root", [])
        (self.folder / "root.json").write_bytes(root)
        hosts = [word for host in dict.fromkeys((self.host, HOST)) for word in ("--host", host)]
        self._run_once(
            "init", *hosts, "--root", str(self.folder / "root.json"), "--online", str(online_folder),
            "--bind", HOST, "--gateway-port", "0", "--api-port", "0",
        )  # fmt: skip

    def _command(self, verb: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "instar_server.main", verb, "--data", str(self.layout.data), *options]

    def _run_once(self, verb: str, *options: str) -> None:
        done = subprocess.run(
            self._command(verb, *options),
            capture_output=True, text=True, timeout=START_S, check=False, start_new_session=True,
        )  # fmt: skip
        if done.returncode != 0:
            said = done.stderr.strip()[-2000:]
            raise MachineError("server-failed", f"cannot {verb} the server: status {done.returncode}: {said}")

    def start(self) -> None:
        """Run it and wait until it listens. Started again, it has the same ports, so nodes find it."""
        ports = (self._ports.get(name) or machine.free_port() for name in ("gateway_port", "api_port"))
        options = [f"--{name}-port={port}" for name, port in zip(("gateway", "api"), ports, strict=True)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command("run", *options),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        pid = self._process.pid

        def listening() -> bool:
            self.check()
            try:
                self._ports = json.loads(self.layout.ports.read_bytes())
            except (FileNotFoundError, ValueError):
                return False
            return self._ports.get("pid") == pid

        machine.wait_for(
            listening, "a listening server", START_S, lambda: machine.tail(self.log), every_s=0.02
        )

    def check(self) -> None:
        """Raises MachineError when the process has ended."""
        if self._process is None or self._process.poll() is not None:
            status = None if self._process is None else self._process.returncode
            raise MachineError("server-gone", f"the server has ended ({status}):\n{machine.tail(self.log)}")

    def stop(self) -> None:
        """End it with TERM, as a service manager does. Raises MachineError when it does not end in time."""
        if self._process is None:
            return
        self._hang_up()
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise MachineError(
                "server-late",
                f"the server did not end within {STOP_S:g} s of TERM:\n{machine.tail(self.log)}",
            ) from None
        self._forget()

    def kill(self) -> None:
        """End it with KILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(STOP_S)
        self._forget()

    def close(self) -> None:
        """End it, whatever state it is in."""
        try:
            self.stop()
        except MachineError:
            return

    def _forget(self) -> None:
        self._process = None
        self._hang_up()

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.__exit__()
            self._client = None

    @property
    def pid(self) -> int:
        self.check()
        assert self._process is not None
        return self._process.pid

    @property
    def ca(self) -> Path:
        return self.layout.ca / "ca.pem"

    @property
    def api(self) -> Client:
        """The API as its first admin. Kept open: one TLS handshake serves all questions."""
        if self._client is None:
            self._client = Client(self.access)
        return self._client

    @property
    def access(self) -> Access:
        """For a client of one's own: in another thread, say."""
        token = self.layout.admin_token.read_text().strip()
        return Access(f"https://{HOST}:{self._ports['api_port']}", token, str(self.ca))

    def gateway(self) -> tuple[str, int]:
        """Host and port of the gateway, for whoever is on this machine."""
        return HOST, int(self._ports["gateway_port"])

    # --- releases

    def publish(self, program: build.Program) -> Release:
        """Pack, sign with as many keys as are needed, upload, publish."""
        return self.publish_release(pack_release(program.data, program.version))

    def publish_recovery(self, core: build.Program) -> Release:
        """The same for a recovery core."""
        return self.publish_release(pack_recovery(core.data, core.version))

    def publish_module(self, folder: Path) -> Release:
        """The same for a module from its source folder; what has to be compiled is compiled first."""
        return self.publish_release(modules.pack(folder))

    def publish_release(self, release: Release, gone: Sequence[Release] = ()) -> Release:
        """Sign, upload and publish what was packed; those that are `gone` are published no more, and removed."""
        file = self.folder / "upload"
        file.write_bytes(release.archive)
        built = Built(release.path, len(release.archive), release.sha256, release.custom)
        self.publish_file(built, file, gone)
        return release

    def publish_file(self, built: Built, file: Path, gone: Sequence[Release] = ()) -> None:
        """The same for what is too large for memory: a system's bundle, as `instar_server.trust.bundle` built it."""
        self.api.upload(f"/blobs/{built.sha256}", file)
        current = self._current_targets()
        for old in gone:
            current = offline.remove_target(current, old.path, in_days(90))
        unsigned = offline.add_target(
            current, built.path, built.length, built.sha256, built.custom, in_days(90)
        )
        root = self.api.get_bytes("/trust/metadata/root.json")
        self.api.put_bytes("/trust/targets", self._signed(unsigned, "targets", [root]))
        for old in gone:
            for path in self._blobs(old):
                path.unlink(missing_ok=True)

    def _current_targets(self) -> bytes:
        """What is served now; before the first release, an empty list (never signed: the next version is)."""
        try:
            return self.api.get_bytes("/trust/metadata/targets.json")
        except ServerRefused as error:
            if error.code != "no-metadata":
                raise
            return offline.first_targets(in_days(90))

    def _signed(self, data: bytes, role: str, roots: Sequence[bytes]) -> bytes:
        for signer in self._signers[role]:
            data = offline.sign(data, signer, roots)
        return data

    def _blobs(self, release: Release) -> list[Path]:
        """The server's files of a release."""
        return [path for path in self.layout.data.rglob(f"*{release.sha256}*") if path.is_file()]

    def alter(self, release: Release) -> None:
        """Change one byte in the middle of a published archive, behind the server's back."""
        files = self._blobs(release)
        if not files:
            raise MachineError("no-blob", f"cannot alter {release.path}: no file of it is there")
        for inode in {os.stat(path).st_ino: path for path in files}.values():
            with inode.open("r+b") as file:
                middle = len(release.archive) // 2
                file.seek(middle)
                byte = file.read(1)[0]
                file.seek(middle)
                file.write(bytes((byte ^ 0x01,)))

    # --- nodes

    def want(self, version: str, lines: Sequence[str], group: str = "default", via: str = "pull") -> None:
        """Want a published release for a group; the group is made if it is not there. `via`: pull, native or
        recovery."""
        self.api.post("/groups", {"name": group})
        body = {"scope": "group", "subject": group, "lines": list(lines), "version": version, "via": via}
        self.api.put("/wishes", body)

    def parcel(self, version: str, path: Path, kind: str = "node") -> str:
        """Write the parcel of a published release, or of a recovery core; its SHA-384."""
        return self.api.download(f"/releases/{version}/parcel", path, kind=kind)

    def recover(self, node: str, version: str | None = None, lines: Sequence[str] = ()) -> dict[str, Any]:
        """Begin a recovery of a connected node; how it goes is told by `transfer`."""
        body: dict[str, Any] = {"version": version} | ({"lines": list(lines)} if lines else {})
        begun: dict[str, Any] = self.api.post(f"/nodes/{node}/recover", body)
        return begun

    def transfer(self, node: str) -> dict[str, Any]:
        """What is being sent to a node, or was last."""
        found: dict[str, Any] = self.api.get(f"/nodes/{node}/transfer")
        return found

    def token(self, uses: int, group: str = "default") -> str:
        """A new enrolment token."""
        return str(self.api.post("/tokens", {"group": group, "uses": uses, "label": "lab"})["token"])

    def hand_out(self, program: build.Program, token: str, path: Path) -> None:
        """Write the program as the server hands it out: with address, root of trust and token inside."""
        path.write_bytes(self.api.get_bytes("/program", token=token, version=program.version))
        path.chmod(0o700)

    def nodes(self) -> list[NodeSeen]:
        found = self.api.get("/nodes", limit=1000)["nodes"]
        return [
            NodeSeen(
                node["id"], node["state"], node["agent"]["digest"], node["updater"]["digest"],
                node["connected_since"] or 0.0,
            )
            for node in found
        ]  # fmt: skip

    def history(self, node: str) -> list[dict[str, Any]]:
        """What the server knows of a node's past, oldest first. Raises MachineError when it was tampered with."""
        found = self.api.get(f"/nodes/{node}/history", limit=1000)
        if not found["whole"]:
            raise MachineError("history-altered", f"the history of {node} is not whole: {found['fault']}")
        return list(reversed(found["entries"]))


def in_days(days: int) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
