"""POST /v1/push of a node's updater: a real updater's process, real sockets, real TLS."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from typing import Any

import pytest

from instar.updater.http import openapi
from tests.node import updater_host
from tests.node.updater_host import (
    MIB,
    PASSING_S,
    Host,
    Parcel,
    check,
    host,
    hosted,
    quiet,
)

__all__ = ["host", "quiet"]  # fixtures


def push(host: Host, parcel: Parcel, line: str = "agent", **fields: str) -> tuple[int, Any]:
    with contextlib.closing(host.connection()) as connection:
        headers = parcel.fields(**fields)
        connection.request("POST", f"/v1/push?line={line}", parcel.blocks(), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_a_push_becomes_a_transaction_and_what_nobody_signed_goes_no_further(quiet: Host) -> None:
    parcel = Parcel(MIB)
    status, body = push(quiet, parcel)
    assert (status, body["line"], body["version"]) == (202, "agent", "1.1.0"), body
    check(openapi.SCHEMAS["Pushed"], body)
    with contextlib.closing(quiet.connection()) as connection:
        connection.request("GET", f"/v1/transactions/{body['tx']}/events")
        answer = connection.getresponse()
        assert answer.getheader("Content-Type") == "text/event-stream"
        events = [json.loads(line[6:]) for line in answer.read().splitlines() if line.startswith(b"data: ")]
    for event in events:
        check(openapi.SCHEMAS["Transaction"], event)
    last = events[-1]
    assert (last["state"], last["finished"], last["cause"]) == ("reverted", True, "push"), last
    assert last["reason"]["code"], last
    assert quiet.remote("GET", f"/v1/transactions/{body['tx']}?wait_s=5") == (200, last)
    assert quiet.remote("GET", "/v1/transactions?limit=1")[1]["transactions"] == [last]
    assert quiet.local("GET", "/v1/releases")[1]["lines"]["agent"]["current"].startswith("1.0.0-")


@pytest.mark.parametrize(
    ("change", "line", "status", "code"),
    [
        ({"Instar-SHA384": "0" * 96}, "agent", 400, "altered-parcel"),
        ({"Instar-SHA384": "xyz"}, "agent", 400, "bad-digest"),
        ({"Instar-SHA384": ""}, "agent", 400, "bad-digest"),
        ({}, "module/inventory", 400, "unknown-line"),
        ({}, "../../etc", 400, "unknown-line"),
        ({"Content-Length": str(1 << 40)}, "agent", 413, "too-large"),
        ({"Content-Length": "0"}, "agent", 411, "length-required"),
    ],
)  # fmt: skip
def test_a_push_that_says_something_wrong_leaves_nothing(
    quiet: Host, change: dict[str, str], line: str, status: int, code: str
) -> None:
    got, body = push(quiet, Parcel(MIB), line, **change)
    assert (got, body["error"]["code"]) == (status, code)
    assert str(status) in openapi.document("1")["paths"]["/v1/push"]["post"]["responses"]
    assert nothing_of_it(quiet)


def nothing_of_it(host: Host) -> bool:
    health = host.local("GET", "/v1/health")[1]
    return not host.left_over() and not health["transaction"] and health["receiving"] is None


@pytest.mark.parametrize(
    ("parcel", "code"),
    [
        (Parcel(MIB, kind="recovery"), "wrong-kind"),
        (Parcel(MIB, version="1.0.0", digest=updater_host.program().digest), "already-current"),
    ],
)
def test_a_parcel_that_is_of_no_use_leaves_nothing(quiet: Host, parcel: Parcel, code: str) -> None:
    status, body = push(quiet, parcel)
    assert (status in (400, 409), body["error"]["code"]) == (True, code)
    assert nothing_of_it(quiet)


def test_a_body_that_is_no_parcel_leaves_nothing(quiet: Host) -> None:
    import hashlib

    data = os.urandom(3 * MIB)
    fields = {"Instar-SHA384": hashlib.sha384(data).hexdigest()}
    with contextlib.closing(quiet.connection()) as connection:
        connection.request("POST", "/v1/push?line=agent", data, fields)
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (400, "bad-parcel")
    assert nothing_of_it(quiet)


def test_a_body_that_ends_early_is_refused_and_leaves_nothing(quiet: Host) -> None:
    parcel = Parcel(4 * MIB)
    head = begin_push(parcel)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plain:
        plain.settimeout(PASSING_S)
        plain.connect(str(quiet.layout.socket("updater")))
        plain.sendall(head + parcel.data[: 3 * MIB])
        plain.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(plain)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (400, "cut-off")
    assert nothing_of_it(quiet)
    with contextlib.closing(quiet.raw()) as secure:  # and over TLS, by somebody who just goes away
        secure.sendall(head + parcel.data[: 3 * MIB])
        updater_host.wait_for(lambda: quiet.local("GET", "/v1/health")[1]["receiving"], PASSING_S, quiet.log)
    updater_host.wait_for(lambda: nothing_of_it(quiet), PASSING_S, quiet.log)


def test_what_a_killed_updater_has_left_of_a_push_goes_with_the_next() -> None:
    parcel = Parcel(4 * MIB)
    with hosted() as host:
        host.start()
        with contextlib.closing(host.raw()) as secure:
            secure.sendall(begin_push(parcel) + parcel.data[: 3 * MIB])
            updater_host.wait_for(host.left_over, PASSING_S, host.log)
            assert host.process is not None
            host.process.kill()
            host.process.wait()
        assert host.left_over()
        host.start()
        assert host.left_over() == []


def test_a_push_that_was_accepted_outlives_a_killed_updater() -> None:
    parcel = Parcel(MIB)
    with hosted() as host:
        host.start()
        journal, away = host.layout.journal, host.layout.journal.with_name("away")
        journal.rename(away)
        journal.write_text("")  # so that it cannot be begun before the kill
        status, body = host.local(
            "POST", "/v1/push?line=agent", body=parcel.data, Instar_SHA384=parcel.sha384
        )
        assert status == 202, body
        assert host.process is not None
        host.process.kill()
        host.process.wait()
        journal.unlink()
        away.rename(journal)
        host.start()
        ended = updater_host.wait_for(
            lambda: (
                (found := host.local("GET", f"/v1/transactions/{body['tx']}"))[0] == 200
                and found[1]["state"] == "reverted"
            ),
            PASSING_S,
            host.log,
        )
        assert ended, "its metadata are of no use, and that is said"
        assert not host.layout.orders.exists()


def begin_push(parcel: Parcel, line: str = "agent", more: str = "") -> bytes:
    fields = "".join(f"{name}: {value}\r\n" for name, value in parcel.fields().items())
    return f"POST /v1/push?line={line} HTTP/1.1\r\nHost: x\r\n{fields}{more}\r\n".encode()


def test_one_at_a_time_also_while_a_push_is_on_its_way(quiet: Host) -> None:
    parcel = Parcel(4 * MIB)
    with contextlib.closing(quiet.raw()) as first:
        first.sendall(begin_push(parcel, more="Expect: 100-continue\r\n"))
        assert first.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        first.sendall(parcel.data[: 3 * MIB])
        receiving = updater_host.wait_for(
            lambda: (r := quiet.local("GET", "/v1/health")[1]["receiving"]) and r["done"] and r,
            PASSING_S,
            quiet.log,
        )
        tx = receiving["tx"]
        assert receiving["total"] == parcel.length
        shown = quiet.remote("GET", f"/v1/transactions/{tx}")[1]
        check(openapi.SCHEMAS["Transaction"], shown)
        assert (shown["state"], shown["bytes"]["total"]) == ("receiving", parcel.length)
        for status, body in (
            push(quiet, Parcel(MIB), "updater"),
            quiet.local("POST", "/v1/rollback", body={"line": "agent"}),
        ):
            if body["error"]["code"] != "nothing-to-roll-back-to":
                assert (status, body["error"]["code"]) == (409, "busy")
                assert tx in body["error"]["message"]
        first.sendall(parcel.data[3 * MIB :])
        answer = http.client.HTTPResponse(first)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["tx"]) == (202, tx)


def test_a_push_of_200_mb_takes_no_memory() -> None:
    with hosted() as host:
        host.start()
        assert host.remote("GET", "/v1/health")[0] == 200
        parcel = Parcel(200 * 1000 * 1000)
        before = host.memory("VmHWM")
        status, body = push(host, parcel)
        assert status == 202, body
        grown = host.memory("VmHWM") - before
        print(f"peak {before / MIB:.1f} MiB before, {grown / MIB:.2f} MiB more after")
        assert grown < 8 * MIB
        host.remote("GET", f"/v1/transactions/{body['tx']}?wait_s=30")
        assert host.memory("VmHWM") - before < 8 * MIB, "its transaction took more"
