"""Who this node is and what it was told, as the agent needs it."""

from __future__ import annotations

import json
import logging
from typing import NamedTuple
from urllib.parse import urlsplit

from instar.core.errors import InputError
from instar.core.networks import WakeSettings
from instar.host.config import has_settings, read_config
from instar.host.identity import read_node
from instar.host.layout import Layout

log = logging.getLogger("instar.agent")


class Address(NamedTuple):
    """Where to connect to."""

    host: str
    port: int
    user: str = ""  # for a proxy that wants one; never logged
    password: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Node(NamedTuple):
    """This node and its server, and who may wake it."""

    id: str
    server: Address
    proxy: Address | None
    wake: WakeSettings = WakeSettings()
    wasmtime: str = ""  # the folder that holds it, where the configuration names one
    forced: bool = False  # takes what comes through the channel whatever it runs


def load_node(layout: Layout) -> Node:
    """Raises MachineError (`not-enrolled`, `bad-identity`) or InputError (`bad-url`).

    A configuration that cannot be read stops nothing: it is said, and the node goes on without it.
    """
    known = read_node(layout)
    proxy, wake, wasmtime, forced = None, WakeSettings(), "", False
    if has_settings(layout):
        try:
            settings = read_config(layout)
            wake, wasmtime, text = settings.wake, settings.modules.wasmtime, settings.network.proxy
            forced = settings.native.mode == "force"
            proxy = address(text, "http", 3128) if text else None
        except InputError as error:
            log.error("%s; going on with the defaults", error.text)
    return Node(known.node, address(known.server, "https", 443), proxy, wake, wasmtime, forced)


def address(url: str, scheme: str, default_port: int) -> Address:
    """Host and port of `url`. Raises InputError `bad-url`, which shows no password."""
    try:
        parts = urlsplit(url)
        port = parts.port or default_port
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != scheme or not parts.hostname or not parts.hostname.isascii():
        got = ascii(parts.hostname) if parts.hostname else "another form"
        text = f"cannot use address: expected {scheme}://host[:port], got {got}"
        raise InputError("bad-url", text)
    return Address(parts.hostname, port, parts.username or "", parts.password or "")


def trial_tx(layout: Layout, release: str) -> str:
    """The transaction that has `release` of the agent on trial, or ''.

    A record about another release, or one that cannot be read, does not count.
    """
    if not release:
        return ""
    try:
        record = json.loads(layout.line("agent").trial.read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    if not isinstance(record, dict) or record.get("release") != release:
        return ""
    tx = record.get("tx")
    return tx if isinstance(tx, str) else ""
