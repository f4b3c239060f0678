"""`instarctl updater`: a node's updater, spoken to directly, with an operator's certificate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from instar.core.errors import InputError, ReleaseError, ServerUnreachable
from instar.core.system import LINE as SYSTEM
from instar_server.ctl import ids
from instar_server.ctl.operators import CA, CERTIFICATE, KEY
from instar_server.ctl.output import AsJson, make_table, plain_errors, progress_bar, refuse, short, show, when
from instar_server.ctl.tokens import seconds
from instar_server.ctl.updater_client import BACK_WITHIN_S, Papers, Updater

app = typer.Typer(no_args_is_help=True)

Address = Annotated[str, typer.Option(help="HOST:PORT of the updater's API.")]
Node = Annotated[str, typer.Option(help="The node's id: nobody else is spoken to.")]
Certificate = Annotated[Path | None, typer.Option("--cert", help="The operator's certificate.")]
Key = Annotated[Path | None, typer.Option("--key", help="Its key.")]
Authority = Annotated[Path | None, typer.Option("--ca", help="The fleet's CA certificate.")]
Folder = Annotated[
    Path | None, typer.Option("--operator", help="Folder of 'operator issue', in place of the three files.")
]
Line = Annotated[str, typer.Option(help="agent or updater.")]
Wait = Annotated[str, typer.Option(help="For its end.")]
USUAL = "127.0.0.1:7612"
STARTED_S = 15.0  # for an ordered rollback to have a name


def updater_of(
    address: str, node: str, cert: Path | None, key: Path | None, ca: Path | None, folder: Path | None
) -> Updater:
    ids.node_id(node)
    if folder is not None:
        cert, key, ca = cert or folder / CERTIFICATE, key or folder / KEY, ca or folder / CA
    if cert is None or key is None or ca is None:
        raise InputError("bad-options", "cannot say who asks: expected --operator, or --cert, --key and --ca")
    return Updater(address, node, Papers(cert, key, ca))


@app.command()
def health(
    node: Node, address: Address = USUAL, cert: Certificate = None, key: Key = None, ca: Authority = None,
    operator: Folder = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Which updater this is, and what it does now."""
    with plain_errors(as_json):
        found = updater_of(address, node, cert, key, ca, operator).look("/v1/health")
    held = ", ".join(f"{line} on {hold['version']}" for line, hold in found["held"].items())
    lines = [
        f"{found['node']}: updater {found['version']} ({short(found['digest'])}), pid {found['pid']}",
        f"under way: {found['transaction'] or 'nothing'}",
        *([f"held by a push: {held}"] if held else []),
    ]
    show(found, as_json, lambda: "\n".join(lines))


@app.command()
def releases(
    node: Node, address: Address = USUAL, cert: Certificate = None, key: Key = None, ca: Authority = None,
    operator: Folder = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """The releases on the node: what runs, what a rollback goes to."""
    with plain_errors(as_json):
        found = updater_of(address, node, cert, key, ca, operator).look("/v1/releases")
    rows = [
        (
            line,
            r["version"],
            short(r["digest"]),
            when(r["installed"]),
            _part(r),
            "" if r["valid"] else "damaged",
        )
        for line, shown in found["lines"].items()
        for r in shown["releases"]
    ]
    show(found, as_json, lambda: make_table(("line", "version", "digest", "installed", "is", ""), rows))


def _part(release: dict[str, Any]) -> str:
    return "current" if release["current"] else "previous" if release["previous"] else ""


@app.command()
def transactions(
    node: Node, address: Address = USUAL, cert: Certificate = None, key: Key = None, ca: Authority = None,
    operator: Folder = None, as_json: AsJson = False,
    limit: Annotated[int, typer.Option(min=1, max=50, help="The newest so many.")] = 20,
) -> None:  # fmt: skip
    """What happened on the node, newest first."""
    with plain_errors(as_json):
        updater = updater_of(address, node, cert, key, ca, operator)
        found = updater.look(f"/v1/transactions?limit={limit}")
    rows = [
        (t["tx"], t["line"], f"{t['from_version'] or 'none'} -> {t['version']}", t["cause"], t["state"],
         when(t["began"]), t["reason"]["text"] if t["reason"] else "")
        for t in found["transactions"]
    ]  # fmt: skip
    columns = ("transaction", "line", "step", "cause", "state", "began", "why")
    show(found, as_json, lambda: make_table(columns, rows))


@app.command()
def push(
    node: Node,
    parcel: Annotated[Path, typer.Argument(help="What 'release parcel' wrote.")],
    line: Line = "agent",
    address: Address = USUAL, cert: Certificate = None, key: Key = None, ca: Authority = None,
    operator: Folder = None, wait: Wait = "10m", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Install a release from its parcel. Ends with 0 when the node keeps it, else with why it went back."""
    with plain_errors(as_json):
        wait_s = seconds(wait)
        updater = updater_of(address, node, cert, key, ca, operator)
        with progress_bar(parcel.name, quiet=as_json) as progress:
            made = updater.push(line, parcel, progress)
        last = follow_to_end(updater.follow(made["tx"], wait_s), wait_s, quiet=as_json)
        if last["state"] == "confirmed" and line == "updater":
            updater.comes_back(made["digest"])
        finish(last, as_json)


@app.command()
def rollback(
    node: Node,
    line: Annotated[str, typer.Option(help="agent, updater, os or module/NAME.")] = "agent",
    address: Address = USUAL, cert: Certificate = None, key: Key = None, ca: Authority = None,
    operator: Folder = None, wait: Wait = "10m", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Go back to the previous release."""
    with plain_errors(as_json):
        wait_s = seconds(wait)
        updater = updater_of(address, node, cert, key, ca, operator)
        before = {t["tx"] for t in updater.look("/v1/transactions?limit=50")["transactions"]}
        made = updater.call("POST", "/v1/rollback", {"line": line})
        tx = made.get("tx") or _new_rollback(updater, line, before)  # an older updater does not name it
        away_s = wait_s if line == SYSTEM else BACK_WITHIN_S  # the whole machine goes down
        last = follow_to_end(updater.follow(tx, wait_s, away_s), wait_s, quiet=as_json)
        if last["state"] == "confirmed" and line == "updater":
            updater.comes_back(made["digest"])
        finish(last, as_json)


def _new_rollback(updater: Updater, line: str, before: set[str]) -> str:
    end = time.monotonic() + STARTED_S
    while time.monotonic() < end:
        with contextlib.suppress(ServerUnreachable):  # an updater that is on its way back itself
            for found in updater.look("/v1/transactions?limit=50")["transactions"]:
                if (found["line"], found["cause"]) == (line, "rollback") and found["tx"] not in before:
                    return str(found["tx"])
        time.sleep(0.2)
    raise ServerUnreachable("not-begun", f"the rollback has not begun within {STARTED_S:g} s; it is ordered")


@app.command()
def look(
    node: Node, address: Address = USUAL, cert: Certificate = None, key: Key = None, ca: Authority = None,
    operator: Folder = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Have the node ask its server now what is wanted."""
    with plain_errors(as_json):
        found = updater_of(address, node, cert, key, ca, operator).call("POST", "/v1/look", {})
    show(found, as_json, lambda: "it looks")


@app.command()
def watch(
    node: Node,
    tx: Annotated[str | None, typer.Argument(help="A transaction; else the one under way, or the last.")] = None,
    address: Address = USUAL, cert: Certificate = None, key: Key = None, ca: Authority = None,
    operator: Folder = None, wait: Wait = "10m", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Follow a transaction to its end. Ends with 0 when it was confirmed."""
    with plain_errors(as_json):
        wait_s = seconds(wait)
        named = ids.transaction_id(tx) if tx is not None else ""
        updater = updater_of(address, node, cert, key, ca, operator)
        last = follow_to_end(updater.follow(named or _current(updater), wait_s), wait_s, quiet=as_json)
        finish(last, as_json)


def _current(updater: Updater) -> str:
    named = str(updater.look("/v1/health")["transaction"])
    if named.startswith("tx-"):
        return named
    found = updater.look("/v1/transactions?limit=1")["transactions"]
    if not found:
        raise InputError("no-transaction", "cannot follow: nothing has happened on this node yet")
    return str(found[0]["tx"])


def follow_to_end(shown: Iterator[dict[str, Any]], within_s: float, quiet: bool) -> dict[str, Any]:
    """The last state of a transaction; each new one is told on the way, on standard error."""
    end = time.monotonic() + within_s
    told = ""
    say: Callable[[str], None] = (lambda _: None) if quiet else (lambda text: typer.echo(text, err=True))
    last: dict[str, Any] = {}
    for found in shown:
        last = found or last
        text = f"{last['line']} {last['version']}".strip() + f": {_where(last)}" if last else ""
        if text != told:
            say(text)
            told = text
        if time.monotonic() > end:
            break
    if not (last and last["finished"]):
        text = f"no end within {within_s:g} s: it goes on; see 'instarctl updater watch'"
        raise ServerUnreachable("still-under-way", text)
    return last


def _where(shown: dict[str, Any]) -> str:
    phase = f", {shown['phase']}" if shown["phase"] else ""
    size = shown["bytes"]
    said = str(shown["state"]) + phase + (f" {size['done']} of {size['total']} bytes" if size else "")
    why = shown["changes"][-1]["reason"] if shown["changes"] and not shown["finished"] else ""
    return f"{said}: {why}" if why else said


def finish(last: dict[str, Any], as_json: bool) -> None:
    """Ends with a ReleaseError's status and the reason unless it was confirmed; both probes are shown then."""
    if last["state"] == "confirmed":
        text = f"{last['line']} runs {last['version']} ({short(last['digest'])})"
        show(last, as_json, lambda: text)
        return
    if not as_json:
        for part in ("candidate", "restored"):
            for words in _probe(part, (last["probes"] or {}).get(part)):
                typer.echo(words, err=True)
    reason = last["reason"] or {"code": "reverted", "text": "it gave no reason"}
    text = f"{last['line']} went back to {last['from_version']}: {reason['text']}"
    refuse(ReleaseError(str(reason["code"]), text), as_json, last)


def _probe(part: str, probe: dict[str, Any] | None) -> Iterator[str]:
    if not probe:
        return
    how = "answered" if probe.get("ok") else f"did not answer as it should: {probe.get('why')}"
    yield f"probe of the {part} release {probe.get('release')}: {how} ({probe.get('tries')} tries)"
    for line in str(probe.get("output") or "").splitlines():
        yield f"    {line}"
