"""What the updater asks of the server, over the one transport; metadata is verified in a one-shot child."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from instar.core.errors import InstarError, MachineError, ServerUnreachable, TrustError
from instar.core.journal import Reason
from instar.core.system import LINE as SYSTEM
from instar.core.wish import Wanted, read_wanted
from instar.host.children import run_program
from instar.host.clock import Clock
from instar.host.layout import LINES, Layout
from instar.host.line import Line
from instar.host.program import Program
from instar.host.records import write_artifacts
from instar.host.transport import Endpoint, Transport, host_port
from instar.targets.kit import TrustedTarget, Verdict
from instar.trust.program import program_digest

VERIFY_WITHIN_S = 120.0
ARTIFACTS = "artifacts-unreachable"
# Of a server that does not serve. One that is busy, or shows another certificate, is there.
AWAY = ("server-unreachable", "server-not-trusted", "cut-off", "too-slow")


class ServerClient:
    """Implements `instar.targets.kit.Server`. One thread at a time."""

    def __init__(self, transport: Transport, layout: Layout, program: Program) -> None:
        self._transport, self._layout, self._program = transport, layout, program
        self._artifacts: Artifacts | None = None
        self._foreign: Transport | None = None

    def wanted(self, trouble: str = "") -> Wanted:
        """What the server wants. `trouble` tells it why the last try got no further."""
        query = f"?{urlencode({'trouble': trouble})}" if trouble else ""
        wanted = read_wanted(self._transport.call("GET", f"/v1/node/wanted{query}"))
        self.fetch_from(wanted.artifacts)
        return wanted

    def verdict(self, line: str, phase: str, tx: str, digest: str, wait_s: float) -> Verdict:
        asked = {"line": line, "phase": phase, "tx": tx, "digest": digest, "wait_s": f"{wait_s:g}"}
        if line == SYSTEM:  # only what this very boot's agent says counts
            asked["boot_id"] = Clock().boot_id()
        path = f"/v1/node/verdict?{urlencode(asked)}"
        body = self._transport.call("GET", path, timeout_s=wait_s + self._transport.endpoint.timeout_s)
        try:
            reason = body.get("reason") or {}
            verdict = str(body["verdict"])
            if verdict not in ("pass", "fail", "wait"):
                raise ValueError(verdict)
            return Verdict(verdict, Reason(str(reason.get("code", "")), str(reason.get("text", ""))))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerUnreachable("bad-answer", f"cannot read a verdict: {error!r}") from None

    def report(self, events: list[dict[str, Any]]) -> set[str]:
        """Send events; the ids that the server has stored."""
        body = self._transport.call("POST", "/v1/node/events", {"v": 1, "events": events})
        return set(body.get("stored", []))

    def tell_system(self, body: dict[str, Any]) -> None:
        """What the two slots hold, and how far an update is."""
        self._transport.call("POST", "/v1/node/system", body)

    def close(self) -> None:
        for each in (self._transport, self._artifacts, self._foreign):
            if each is not None:
                each.close()

    def source(self) -> Transport:
        return self._artifacts or self._transport

    def elsewhere(self, url: str) -> tuple[Transport, str]:
        """Where `url` leads, and what to ask for there. The node's certificate is shown to its own server only.

        Raises InputError `bad-url`.
        """
        place = host_port(url, "https", 443)
        parts = urlsplit(url)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        for own in (self._transport, self._artifacts):
            if own is not None and place == (own.host, own.port):
                return own, path
        server = f"https://{parts.netloc}"
        if self._foreign is None or self._foreign.endpoint.server != server:
            if self._foreign is not None:
                self._foreign.close()
            known = self._transport.endpoint
            self._foreign = Transport(
                Endpoint(server, known.ca, proxy=known.proxy, timeout_s=known.timeout_s, public=True)
            )
        return self._foreign, path

    def fetch_from(self, server: str) -> None:
        """Metadata and targets are at `server` by now; '' for where everything else is."""
        if server != (self._artifacts.endpoint.server if self._artifacts else ""):
            if self._artifacts:
                self._artifacts.close()
            self._artifacts = Artifacts(replace(self._transport.endpoint, server=server)) if server else None
        with contextlib.suppress(MachineError):
            write_artifacts(self._layout, server)

    def trusted_target(self, target: str, metadata: Path | None = None) -> TrustedTarget:
        arguments = ["verify", "--state", str(self._layout.state), "--target", target]
        arguments += ["--from", str(metadata)] if metadata else self._server_arguments()
        ended = run_program(self.sound_program(), arguments, VERIFY_WITHIN_S)
        try:
            said = json.loads(ended.stdout)
            if said["ok"]:
                found = said["target"]
                hashes = found["hashes"]
                path = f"/v1/{said['url_path']}"
                return TrustedTarget(path, int(found["length"]), str(hashes["sha256"]), dict(found["custom"]))
            code, text, kind = said["error"]["code"], said["error"]["text"], said.get("kind", "trust")
        except (ValueError, KeyError, TypeError):
            raise MachineError("verify-failed", ended.describe("the verify child")) from None
        if kind == "trust":
            raise TrustError(code, text)
        if kind in ("machine", "input"):
            raise MachineError(code, text)
        if kind == "unreachable" and metadata is None and self._artifacts:
            raise _translated(ServerUnreachable(code, text))
        raise ServerUnreachable(code, text)  # expired, stale, absent, unreachable, refused: wait, ask again

    def _server_arguments(self) -> list[str]:
        endpoint = self.source().endpoint
        arguments = ["--program", endpoint.program, "--server", endpoint.server]
        arguments += ["--proxy", endpoint.proxy] if endpoint.proxy else []
        arguments += ["--pin", endpoint.pin] if endpoint.pin else []
        return arguments

    def sound_program(self) -> Path:
        """Our own, unless its file was damaged while we run: then that of the other line, or the oldest copy,
        so that what is damaged can be put there anew."""
        try:
            if program_digest(self._program.path.read_bytes()) == self._program.digest:
                return self._program.path
        except (OSError, InstarError):
            pass
        for role in LINES:
            line = Line(self._layout.line(role))
            if line.is_valid(current := line.current()):
                return line.program(current)
        return self._layout.launcher


class Artifacts(Transport):
    """Fetches from where the server says that metadata and targets are. That it cannot be reached there has
    a code of its own: the server itself answers, and may send what is wanted by another way."""

    @contextlib.contextmanager
    def stream(
        self, path: str, start: int, stop: int | None = None
    ) -> Iterator[tuple[bool, Iterator[bytes]]]:
        try:
            with super().stream(path, start, stop) as found:
                yield found
        except ServerUnreachable as error:
            raise _translated(error) from None


def _translated(error: ServerUnreachable) -> ServerUnreachable:
    return ServerUnreachable(ARTIFACTS, error.text) if error.code in AWAY else error
