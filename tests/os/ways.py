"""The four ways in which a release's bytes come to a node (M3, M5, D1), and the proof of what runs afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from instar.core.errors import InstarError, ServerRefused
from instar_lab import machine
from instar_server.ctl.updater_client import Papers, Updater
from tests.os.node import FINAL, plays
from tests.os.packaged import PackagedNode

WAYS = ("pull", "native", "push", "recovery")
VICTIMS = ("agent", "updater", "core")
WITHIN_S = 120.0  # for an update that is disturbed, with what the disturbance costs
PUSH_S = 120.0
QUIET_S = 0.5  # nothing may have changed for so long when it is called settled


class Operator:
    """Somebody with a certificate for the updaters of the fleet's nodes."""

    def __init__(self, node: PackagedNode, folder: Path) -> None:
        self._node, self._folder = node, folder
        folder.mkdir()
        key = ec.generate_private_key(ec.SECP256R1())
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        body = {
            "name": "ada",
            "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
            "lifetime_s": 86400.0,
        }
        made = node.server.api.post("/operators", body)
        self._papers = Papers(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")
        self._papers.certificate.write_text(made["certificate"])
        self._papers.ca.write_text(made["ca"])
        self._papers.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )

    @property
    def updater(self) -> Updater:
        return Updater(self._node.api, self._node.id, self._papers)

    def parcel(self, version: str) -> Path:
        """Fetched anew: what is in it hangs on the metadata, too."""
        path = self._folder / f"{version}.parcel"
        self._node.server.parcel(version, path)
        return path

    def push(self, version: str, line: str = "agent") -> str:
        """Push until the updater has taken it, as a script would; the transaction. Raises MachineError."""
        parcel = self.parcel(version)

        def taken() -> str | None:
            try:
                return str(self.updater.push(line, parcel, lambda *_: None)["tx"])
            except ServerRefused as error:
                return "there" if error.code == "already-current" else None
            except InstarError:
                return None

        return machine.wait_for(taken, "an updater that takes a push", PUSH_S, self._node.words, every_s=0.5)


def order(node: PackagedNode, operator: Operator, way: str, version: str) -> None:
    """Have the agent's next release come this way."""
    if way == "push":
        operator.push(version)
    else:
        node.server.want(version, ("agent",), node.group, way)


class Disturber:
    """Kills what it is told to, by chance. What it did is in `told`."""

    def __init__(self, node: PackagedNode, chance: random.Random) -> None:
        self._node, self._chance = node, chance
        self.told: list[str] = []

    def kill(self, victim: str) -> bool:
        """SIGKILL to whoever plays the part now; whether anybody did."""
        found = [seen for seen in self._node.container.processes() if _is(seen, victim)]
        for seen in found:
            machine.signal_process(seen, signal.SIGKILL)
        self.told.append(f"{victim}{'' if found else ' (none)'}")
        return bool(found)

    def kill_some(self, way: str) -> None:
        """One or two of them, each at some moment of the next seconds."""
        for _ in range(self._chance.choice((1, 1, 2))):
            machine.pause(self._chance.uniform(0.0, 1.5))
            self.kill(self._chance.choice(VICTIMS if way == "recovery" else VICTIMS[:2]))

    def cut_power(self) -> None:
        machine.pause(self._chance.uniform(0.0, 2.5))
        self.told.append("power")
        self._node.container.cut_power()
        self._node.container.boot()


def _is(seen: machine.Seen, victim: str) -> bool:
    if victim == "core":
        return (
            any("/run/recovery/core-" in word for word in seen.words) and "systemd-run" not in seen.words[0]
        )
    return plays(seen, victim)


# --- what runs


def running(node: PackagedNode) -> list[str]:
    """The program digests of all agents inside: read from the very files that the processes were started from."""
    found = []
    for seen in node.container.processes():
        if plays(seen, "agent"):
            program = next(word for word in seen.words if word.endswith(".pyz"))
            with contextlib.suppress(OSError):
                data = Path(f"/proc/{seen.pid}/root{program}").read_bytes()
                found.append(hashlib.sha384(data[:-2]).hexdigest())
    return found


def settled(node: PackagedNode, aim: str, known: set[str], within_s: float = WITHIN_S) -> str:
    """Wait until all that was begun has ended, `aim` has been tried since `known` at least once, and exactly one
    agent runs, is on its channel, and is the release that is current. Its version.
    """
    names = {program.digest: version for version, program in node.programs.items()}
    last: list[tuple[str, float]] = []

    def done() -> str | None:
        version = _at_rest(node, aim, known, names)
        if not version or not last or last[-1][0] != version:
            last.append((version or "", time.monotonic()))
            return None
        return version if time.monotonic() - last[-1][1] >= QUIET_S else None

    return machine.wait_for(
        done, f"one agent, after {aim}", within_s, lambda: f"{state(node)}\n{node.words()}"
    )


def _at_rest(node: PackagedNode, aim: str, known: set[str], names: dict[str, str]) -> str:
    """The version of the one agent; '' while something is under way."""
    try:
        entries = node.history()
        seen = next(each for each in node.server.nodes() if each.id == node.id)
    except InstarError:
        return ""
    if any(each["state"] not in FINAL for each in entries):
        return ""
    digests = running(node)
    if len(digests) != 1 or not seen.connected_since or seen.agent != digests[0]:
        return ""
    version = names.get(digests[0], "")
    tried = any(e["version"] == aim and e["line"] == "agent" and e["tx"] not in known for e in entries)
    at_aim = version == aim
    if not (at_aim or tried) or node.layout.line("agent").trial.exists():
        return ""
    current = node.layout.line("agent").current.readlink().name
    return version if current.startswith(f"{version}-") else ""


def state(node: PackagedNode) -> str:
    entries: object
    try:
        entries = [(e["version"], e["state"], e["cause"], e["reason"]) for e in node.history()[-4:]]
    except InstarError as error:
        entries = error
    agents = [" ".join(seen.words) for seen in node.container.processes() if plays(seen, "agent")]
    return f"history: {entries}\nagents: {agents}\nresidents: {node.residents()}"


def reason(node: PackagedNode, version: str) -> str:
    """Why the last try of it ended as it did."""
    last = next(each for each in reversed(node.history()) if each["version"] == version)
    return f"{last['reason']['code']}: {last['reason']['text']}" if last["reason"] else ""


def transactions(node: PackagedNode) -> set[str]:
    return {each["tx"] for each in node.history()}


Disturb = Callable[[], None]


def update(
    node: PackagedNode, operator: Operator, way: str, version: str, disturb: Disturb | None = None
) -> str:
    """One update of the agent this way, disturbed; the version that runs at its end."""
    known = transactions(node)
    order(node, operator, way, version)
    if disturb is not None:
        disturb()
    return settled(node, version, known)
