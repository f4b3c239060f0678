"""When the server says that a release works.

Rehearsal: the candidate did the selftest job and the reply is what the signed target promises.
Trial, line agent: the same for a health job, and the connection that said hello with that digest
and transaction is still up. Trial, line updater: the program that asks is the one asked about, and its
rehearsal passed. Trial, line os: the agent of the boot that is on trial is connected, and well.
Anything unclear is `wait`: only a wrong answer is `fail`.

>>> judge({"nonce": "00", "answer": "x", "version": "1.0.0", "digest": "d"}, "00", "1.0.0", "d").verdict
'fail'
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from instar.wire.messages import Result

PASS, FAIL, WAIT = "pass", "fail", "wait"


@dataclass(frozen=True, slots=True)
class Verdict:
    verdict: str  # pass | fail | wait
    code: str = ""
    text: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"v": 1, "verdict": self.verdict, "reason": {"code": self.code, "text": self.text}}


@dataclass(frozen=True, slots=True)
class Recorded:
    """A verdict that was stored, and the program digest that it is about."""

    digest: str
    verdict: Verdict


def expected_answer(nonce: str, digest: str, version: str) -> str:
    """What module `selftest` answers: SHA-256, hexadecimal (docs/protocol.md)."""
    return hashlib.sha256(f"{nonce}:{digest}:{version}".encode()).hexdigest()


def judge(reply: Mapping[str, Any], nonce: str, version: str, digest: str) -> Verdict:
    """Compare a selftest reply with what the signed target promises."""
    expected = {
        "nonce": nonce,
        "version": version,
        "digest": digest,
        "answer": expected_answer(nonce, digest, version),
    }
    for name, wanted in expected.items():
        got = reply.get(name)
        if got != wanted:
            text = f"cannot accept the selftest: expected {name} {wanted}, got {str(got)[:120]!r}"
            return Verdict(FAIL, f"wrong-{name}", text)
    return Verdict(PASS, "as-expected", "the selftest answered as the signed release promises")


def judge_result(result: Result, nonce: str, version: str, digest: str) -> Verdict:
    """The same for a whole job result: a job that failed is a fail."""
    if not result.ok:
        text = f"the selftest failed: {result.reason[:500] or 'no reason given'} (exit {result.exit_code})"
        return Verdict(FAIL, "job-failed", text)
    return judge(result.reply, nonce, version, digest)


def unknown_release(version: str, digest: str) -> Verdict:
    text = f"cannot vouch for {version[:64]}: no published release has the program digest {digest[:12]}…"
    return Verdict(FAIL, "unknown-release", text)


def no_reply(seconds: float) -> Verdict:
    return Verdict(FAIL, "no-reply", f"no reply to the rehearsal's job within {seconds:g} s")


def rehearsal(stored: Recorded | None, digest: str) -> Verdict:
    """The verdict on a rehearsal of the program `digest`."""
    if stored is None:
        return Verdict(WAIT, "not-rehearsed", "no rehearsal of this transaction has ended yet")
    if stored.digest != digest:
        text = f"another program rehearsed: expected {digest[:12]}…, got {stored.digest[:12]}…"
        return Verdict(FAIL, "other-program", text)
    return stored.verdict


def agent_trial(stored: Recorded | None, digest: str, live: tuple[str, str] | None, tx: str) -> Verdict:
    """`live` is (digest, tx) of the hello on the node's connection that is up now, if one is."""
    if stored is not None and stored.digest == digest and stored.verdict.verdict == FAIL:
        return stored.verdict
    if live is None:
        return Verdict(WAIT, "not-connected", "the agent on trial is not connected")
    if live != (digest, tx):
        return Verdict(WAIT, "other-agent", f"the connected agent is {live[0][:12]}…, not the one on trial")
    if stored is None or stored.digest != digest:
        return Verdict(WAIT, "no-health-yet", "the health job of the agent on trial has not answered yet")
    return stored.verdict


def module_trial(name: str, digest: str, live: tuple[Mapping[str, str], Mapping[str, str]] | None) -> Verdict:
    """`live`: states and module digests of the last health that came on the node's connection that is up now."""
    if live is None:
        return Verdict(WAIT, "not-connected", "the node's agent is not connected")
    states, digests = live
    got = digests.get(name, "")
    if got != digest:
        text = (
            f"the node runs {name} {got[:12]}…, not the one on trial"
            if got
            else f"the node does not run {name} yet"
        )
        return Verdict(WAIT, "other-module", text)
    state = states.get(name, "")
    if state != "ok":
        return Verdict(WAIT, "module-not-ok", f"{name} is {state[:32] or 'not there'}, not ok")
    return Verdict(PASS, "as-expected", f"{name} runs and is well")


def updater_trial(rehearsed: Recorded | None, digest: str, asking: tuple[str, str] | None) -> Verdict:
    """`asking` is (role, digest) of the program that asks, from its header."""
    if asking != ("updater", digest):
        return Verdict(WAIT, "other-updater", "the updater that asks is not the one on trial")
    return rehearsal(rehearsed, digest)


def system_trial(live: tuple[str, bool | None] | None, boot_id: str) -> Verdict:
    """`live`: (boot_id, health) of the node's connection that is up now; the health is None until one has come.
    Never a fail: a system that is silent, or not well, is the node's own to judge, against what it was before."""
    if live is None:
        return Verdict(WAIT, "not-connected", "the node's agent is not connected")
    if live[0] != boot_id:
        return Verdict(WAIT, "other-boot", f"the connection is of boot {live[0][:36]}, not of {boot_id[:36]}")
    if live[1] is None:
        return Verdict(WAIT, "no-health-yet", "the agent of this boot has not told of its health yet")
    if not live[1]:
        return Verdict(WAIT, "not-well", "the agent of this boot says that it is not well")
    return Verdict(PASS, "as-expected", "the agent of this boot is connected and well")
