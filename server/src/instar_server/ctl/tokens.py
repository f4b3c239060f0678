"""`instarctl tokens` and `instarctl api-tokens`."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from instar.core.errors import InputError
from instar_server.ctl import ids
from instar_server.ctl.output import AsJson, connected, make_table, plain_errors, show, when

app = typer.Typer(no_args_is_help=True)
api = typer.Typer(no_args_is_help=True)

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
Label = Annotated[str, typer.Option(help="A word for people.")]


def seconds(text: str) -> float:
    """`90`, `30m`, `12h`, `7d` in seconds. Raises InputError `bad-time`."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd]?)", text)
    if match is None:
        raise InputError(
            "bad-time", f"cannot read the time: expected a number with s, m, h or d, got {text!r}"
        )
    return float(match[1]) * _UNITS[match[2] or "s"]


@app.command("create")
def create(
    context: typer.Context,
    group: Annotated[
        str, typer.Option(help="Nodes enrol into this group; made if there is none.")
    ] = "default",
    uses: Annotated[int, typer.Option(help="So many machines may enrol.")] = 1,
    lifetime: Annotated[str, typer.Option(help="Like 30m, 12h, 7d.")] = "1d",
    label: Label = "",
    as_json: AsJson = False,
) -> None:
    """Make an enrolment token. It is shown this once."""
    with plain_errors(as_json):
        lifetime_s = seconds(lifetime)
    with connected(context) as client:
        body = {"group": group, "uses": uses, "lifetime_s": lifetime_s, "label": label}
        made = client.post("/tokens", body)
    if made["group_made"] and not as_json:
        typer.echo(f"group {group} was made", err=True)  # which also shows a name that was mistyped
    show(made, as_json, lambda: str(made["token"]))


@app.command("list")
def list_tokens(context: typer.Context, as_json: AsJson = False) -> None:
    """All enrolment tokens, without their secrets."""
    with connected(context) as client:
        found: list[dict[str, Any]] = client.get("/tokens")["tokens"]
    rows = [
        (t["id"], t["group"], f"{t['uses_left']} of {t['uses']}", when(t["expires"]), t["label"])
        for t in found
    ]
    show(found, as_json, lambda: make_table(("token", "group", "uses left", "expires", "label"), rows))


@app.command("revoke")
def revoke(
    context: typer.Context, token: Annotated[str, typer.Argument(help="Its id.")], as_json: AsJson = False
) -> None:
    """Nobody enrols with this token any more."""
    with connected(context) as client:
        done = client.delete(f"/tokens/{ids.token_id(token)}")
    show(done, as_json, lambda: f"deleted token {token}")


@api.command("create")
def create_api(
    context: typer.Context,
    role: Annotated[str, typer.Option(help="viewer, operator or admin.")] = "viewer",
    label: Label = "",
    as_json: AsJson = False,
) -> None:
    """Make an API token. It is shown this once."""
    with connected(context) as client:
        made = client.post("/api-tokens", {"role": role, "label": label})
    show(made, as_json, lambda: str(made["token"]))


@api.command("list")
def list_api(context: typer.Context, as_json: AsJson = False) -> None:
    """All API tokens, without their secrets."""
    with connected(context) as client:
        found: list[dict[str, Any]] = client.get("/api-tokens")["tokens"]
    rows = [(t["id"], t["role"], when(t["created"]), t["label"]) for t in found]
    show(found, as_json, lambda: make_table(("token", "role", "made", "label"), rows))


@api.command("revoke")
def revoke_api(
    context: typer.Context, token: Annotated[str, typer.Argument(help="Its id.")], as_json: AsJson = False
) -> None:
    """This API token is of no use any more."""
    with connected(context) as client:
        done = client.delete(f"/api-tokens/{ids.token_id(token, 'api-tokens list')}")
    show(done, as_json, lambda: f"deleted API token {token}")
