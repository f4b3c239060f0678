"""The API's own description, OpenAPI 3.1. A test holds every route and every answer against it."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
MOMENT: Schema = {"type": ["number", "null"], "description": "unix time in seconds"}
LINE: Schema = {"type": "string", "description": "agent, updater, os or module/NAME"}
DIGEST: Schema = {"type": "string", "pattern": "^([0-9a-f]{96})?$", "description": "program digest, SHA-384"}
TX: Schema = {"type": "string", "pattern": "^tx-[0-9a-f]{16}$"}


def _object(**fields: Schema) -> Schema:
    return {"type": "object", "required": list(fields), "properties": fields, "additionalProperties": False}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _map(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


BYTES = _object(done=COUNT, total=COUNT)
SCHEMAS: dict[str, Schema] = {
    "Error": _object(error=_object(code=TEXT, message=TEXT)),
    "Health": _object(
        node=TEXT, version=TEXT, digest=DIGEST, release=TEXT, pid=COUNT,
        transaction={**TEXT, "description": "what is under way or ordered, '' for nothing"},
        receiving=_or_null(_object(tx=TX, done=COUNT, total=COUNT)),
        held=_map(_object(version=TEXT, digest=DIGEST, generation={"type": "integer"})),
    ),
    "Release": _object(
        name=TEXT, version=TEXT, digest=DIGEST, installed={"type": "number"}, valid={"type": "boolean"},
        current={"type": "boolean"}, previous={"type": "boolean"},
    ),
    "Releases": _object(
        lines=_map(
            _object(
                current=TEXT, previous=TEXT, trial={**TEXT, "description": "the transaction on trial"},
                releases={"type": "array", "items": _ref("Release")},
            )
        )
    ),
    "Change": _object(number=COUNT, state=TEXT, wall={"type": "number"}, reason=TEXT),
    "Transaction": _object(
        tx={**TEXT, "pattern": "^tx-"}, line=LINE,
        cause={**TEXT, "description": "wish, rollback, push, recovery or cold-boot"},
        via={**TEXT, "description": "native, push, recovery; '' for fetched"},
        version=TEXT, digest=DIGEST, from_version=TEXT,
        state={**TEXT, "description": "a state of docs/transaction.md; receiving or waiting before it begins"},
        finished={"type": "boolean"},
        phase={**TEXT, "description": "the step that is done now"},
        bytes=_or_null(BYTES),
        reason=_or_null(_object(code=TEXT, text=TEXT)),
        began=MOMENT, ended=MOMENT,
        changes={"type": "array", "items": _ref("Change")},
        probes={"description": "what the agent answered after the switch, and after the way back"},
    ),
    "Transactions": _object(transactions={"type": "array", "items": _ref("Transaction")}),
    "Pushed": _object(tx=TX, line=LINE, version=TEXT, digest=DIGEST),
    "System": _object(
        v=COUNT,
        running={"enum": ["a", "b", ""], "description": "the slot of the mounted root, '' where it is in neither"},
        hardware={"type": "array", "items": TEXT, "description": "what bundles may be for"},
        arch=TEXT, backend={"enum": ["firmware", "counting", ""], "description": "what chooses between the slots"},
        slots=_map(_ref("Slot")),
        boot={"anyOf": [_ref("Boot"), _object()]},
        update=_or_null(
            _object(
                tx={**TEXT, "pattern": "^tx-"}, generation=COUNT, step=TEXT, slot={"enum": ["a", "b", ""]},
                done=COUNT, total=COUNT, fetched=COUNT, reused=COUNT,
            )
        ),
        error=_or_null(_object(code=TEXT, text=TEXT)),
    ),
    "Slot": _object(
        version=TEXT, digest=DIGEST,
        state={"enum": ["unknown", "writing", "installed", "trial", "good", "bad"]},
        size=COUNT, done=COUNT, since={"type": "number"}, why=TEXT, booted_by=TEXT,
        cold_boot_seen={"type": "boolean", "description": "the firmware itself has started this version"},
    ),
    "Boot": _object(
        order={"type": "array", "items": TEXT}, once={**TEXT, "description": "the slot that the next boot tries"},
        tries={**_map(COUNT), "description": "left of each slot, where they are counted"},
        drift={"type": "array", "items": TEXT, "description": "what is not as we left it, in words"},
    ),
    "Ordered": _object(tx=TX, line=LINE, version=TEXT, digest=DIGEST, activation=TEXT),
    "RolledBack": _object(tx=TX, line=LINE, version=TEXT, digest=DIGEST),
    "Nothing": _object(),
}  # fmt: skip

WHY = {
    "400": "What was asked for has a wrong form, or the parcel is not what was announced",
    "403": "The certificate is not an operator's",
    "404": "There is no such thing",
    "405": "Not by this method",
    "408": "It came too slowly",
    "409": "It does not fit what is there: `busy` names the transaction that is under way",
    "411": "Content-Length is missing",
    "412": "This machine has no slots, or cannot take that system image",
    "413": "The body is too large",
    "431": "The head is too large",
    "503": "This machine cannot do it now",
    "505": "Not this version of HTTP",
}


def _query(name: str, what: str, **schema: Any) -> Schema:
    return {"name": name, "in": "query", "required": False, "description": what, "schema": schema}


def _call(what: str, status: str, schema: str, faults: str = "", **more: Any) -> Schema:
    """One operation; every one may be refused for its head, its caller or its query."""
    codes = sorted({*faults.split(), "400", "403", "408", "431", "503", "505", "411"})
    answers: Schema = {status: _content("Done", "application/json", schema)}
    answers |= {code: _content(WHY[code], "application/json", "Error") for code in codes}
    return {"summary": what, "responses": answers, **more}


def _content(what: str, kind: str, schema: str) -> Schema:
    return {"description": what, "content": {kind: {"schema": _ref(schema)}}}


def _events() -> Schema:
    text = "Server-sent events: the data of each is a Transaction. `event: gone` when it never began."
    found = _call("Follow a transaction to its end", "200", "Transaction", "404", parameters=[TX_IN_PATH])
    found["responses"]["200"] = {"description": text, "content": {"text/event-stream": {"schema": TEXT}}}
    return found


TX_IN_PATH: Schema = {"name": "tx", "in": "path", "required": True, "schema": TX}
LINE_BODY = {"schema": {"type": "object", "properties": {"line": LINE}, "additionalProperties": False}}
UPDATE_OS_BODY: Schema = {
    "schema": {
        "type": "object",
        "required": ["activation"],
        "properties": {
            "bundle": {
                "type": "string",
                "description": "NAME-VERSION, os/NAME-VERSION.bundle, or an https URL of it",
            },
            "target": {"type": "string", "description": "the signed name, in place of bundle"},
            "activation": {"enum": ["none", "reboot", "kexec"]},
            "override_cold_boot": {
                "type": "boolean",
                "description": "also while the system that runs was never seen to be started by the firmware",
            },
        },
        "additionalProperties": False,
    }
}
PUSH: Schema = {
    "parameters": [
        _query("line", "what is replaced", enum=["agent", "updater"], default="agent"),
        {
            "name": "Instar-SHA384", "in": "header", "required": True,
            "description": "SHA-384 of the body, hexadecimal", "schema": {"type": "string"},
        },
    ],
    "requestBody": {
        "required": True,
        "description": "A parcel. Content-Length is required.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}  # fmt: skip


def _paths() -> Schema:
    wait = _query("wait_s", "wait so long for its end", type="number", minimum=0, maximum=30, default=0)
    limit = _query("limit", "the newest so many", type="integer", minimum=1, maximum=50, default=20)
    body = {"content": {"application/json": LINE_BODY}}
    return {
        "/v1/health": {"get": _call("The updater, and what it does", "200", "Health")},
        "/v1/releases": {"get": _call("The releases of each line", "200", "Releases")},
        "/v1/transactions": {
            "get": _call("What happened here, newest first", "200", "Transactions", parameters=[limit])
        },
        "/v1/transactions/{tx}": {
            "get": _call("One transaction", "200", "Transaction", "404", parameters=[TX_IN_PATH, wait])
        },
        "/v1/transactions/{tx}/events": {"get": _events()},
        "/v1/push": {
            "post": _call("Install a release from its parcel", "202", "Pushed", "409 413", **PUSH),
        },
        "/v1/rollback": {
            "post": _call("Go back to the previous release", "202", "RolledBack", "409 412 413", requestBody=body)
        },
        "/v1/system": {"get": _call("The two slots of the operating system", "200", "System")},
        "/v1/update-os": {
            "post": _call(
                "Put a system image into the slot that does not run", "202", "Ordered", "404 409 412 413",
                requestBody={"required": True, "content": {"application/json": UPDATE_OS_BODY}},
            )
        },
        "/v1/look": {"post": _call("Ask the server now what is wanted", "202", "Nothing", "413")},
        "/v1/openapi.json": {
            "get": {
                "summary": "This document",
                "responses": {"200": {"description": "OpenAPI", "content": {"application/json": {}}}},
            }
        },
    }  # fmt: skip


def document(version: str) -> Schema:
    about = (
        "Over the node's local socket for root and the node's own user; over TLS for those who show a "
        "certificate of the fleet's CA that names instar://operator/NAME."
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Instar updater", "version": version, "description": about},
        "paths": _paths(),
        "components": {"schemas": SCHEMAS},
    }
