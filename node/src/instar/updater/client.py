"""What the updater asks of the server, over the one transport; metadata is verified in a one-shot child."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from instar.core.errors import MachineError, ServerUnreachable, TrustError
from instar.core.journal import Reason
from instar.core.wish import Wanted, read_wanted
from instar.host.children import run_program
from instar.host.layout import Layout
from instar.host.program import Program
from instar.host.transport import Transport
from instar.targets.kit import TrustedTarget, Verdict

VERIFY_WITHIN_S = 120.0


class ServerClient:
    """Implements `instar.targets.kit.Server`. One thread at a time."""

    def __init__(self, transport: Transport, layout: Layout, program: Program) -> None:
        self._transport, self._layout, self._program = transport, layout, program

    def wanted(self) -> Wanted:
        return read_wanted(self._transport.call("GET", "/v1/node/wanted"))

    def verdict(self, line: str, phase: str, tx: str, digest: str, wait_s: float) -> Verdict:
        query = urlencode({"line": line, "phase": phase, "tx": tx, "digest": digest, "wait_s": f"{wait_s:g}"})
        path = f"/v1/node/verdict?{query}"
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

    def source(self) -> Transport:
        return self._transport

    def trusted_target(self, target: str) -> TrustedTarget:
        endpoint = self._transport.endpoint
        arguments = ["verify", "--state", str(self._layout.state), "--target", target]
        arguments += ["--program", endpoint.program]
        arguments += ["--proxy", endpoint.proxy] if endpoint.proxy else []
        ended = run_program(self._program.path, arguments, VERIFY_WITHIN_S)
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
        raise ServerUnreachable(code, text)  # expired, stale, absent, unreachable, refused: wait, ask again
