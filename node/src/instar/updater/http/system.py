"""GET /v1/system and POST /v1/update-os: the two slots, and an image for the one that does not run.

The order that must hold: the words of the body, who else is at work, then what is signed under that name, then
whether this machine could take it. Only then is it ordered; what is refused has written nothing.
"""

from __future__ import annotations

import logging
import re
import uuid
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from instar.core.errors import InputError, InstarError, MachineError, ServerUnreachable
from instar.core.releases import Release
from instar.core.system import LINE, check_mode, check_source
from instar.host.records import read_artifacts
from instar.targets.kit import TrustedTarget
from instar.trust.bundle import KIND
from instar.trust.paths import check_path
from instar.updater.http.answers import Answer
from instar.updater.http.calls import Call, Services, json_body
from instar.updater.orders import Updating

KNOWN = ("bundle", "target", "activation", "override_cold_boot")
FILE = re.compile(r"[^/]+-\d+\.\d+\.\d+(?:-[0-9a-z]+)?\.bundle")
ABSENT = "no-such-target"
FORMS = "NAME-VERSION, os/NAME-VERSION.bundle or https://host/path/NAME-VERSION.bundle"

log = logging.getLogger("instar.updater")


class Asked(NamedTuple):
    """`source`: where its bytes come from; '' for the server."""

    target: str
    source: str


def system(call: Call) -> Answer:
    """Both slots, how the machine chooses between them, and what is under way."""
    services = call.services
    return Answer(200, services.targets.system().report() if services.targets.has_slots else _none())


def _none() -> dict[str, Any]:
    return {
        "v": 1, "running": "", "hardware": [], "arch": "", "backend": "", "slots": {}, "boot": {}, "update": None,
        "error": {"code": "no-slots", "text": "this node has no slots: os.disk of its config.toml names none"},
    }  # fmt: skip


def update_os(call: Call) -> Answer:
    services, said = call.services, json_body(call, KNOWN)
    mode, asked = check_mode(said.get("activation")), read_bundle(said)
    override = said.get("override_cold_boot", False)
    if not isinstance(override, bool):
        raise _invalid(f"expected override_cold_boot to be true or false, got {override!a:.60}")
    _refuse_second(services)
    release = _fitting(services, asked)
    tx = f"tx-{uuid.uuid4().hex[:16]}"
    order = Updating(tx, release.version, release.digest, asked.target, mode, asked.source, override)
    try:
        services.orders.order_update(order)
    except InputError as error:
        raise InputError("aborted", error.text) from None
    log.info("%s wants %s in the other slot: %s", call.caller, release.name, tx)
    return Answer(
        202,
        {"tx": tx, "line": LINE, "version": release.version, "digest": release.digest, "activation": mode},
        (("Location", f"/v1/transactions/{tx}"),),
    )


def read_bundle(said: dict[str, Any]) -> Asked:
    """What `bundle`, or `target` for the signed name alone, asks for. Raises InputError `invalid-argument`."""
    if ("bundle" in said) == ("target" in said):
        raise _invalid(
            f"expected a bundle as {FORMS}, or a target, got {'both' if 'bundle' in said else 'nothing'}"
        )
    text = said.get("bundle", said.get("target"))
    if not isinstance(text, str):
        raise _invalid(f"expected a bundle as {FORMS}, got {text!a:.60}")
    source = check_source(text) if "://" in text and "bundle" in said else ""
    try:
        target = f"os/{unquote(urlsplit(source).path.rpartition('/')[2])}" if source else text
    except ValueError:  # an address that is none
        raise _invalid(f"expected a bundle as {FORMS}, got {text!a:.200}") from None
    if "/" not in target and "bundle" in said:
        target = f"os/{target}.bundle"
    folder, _, file = target.partition("/")
    try:
        check_path(target, "target")
        if folder != "os" or not file.isprintable() or " " in file or not FILE.fullmatch(file):
            raise InputError("bad-path", "it is no bundle's")
    except InputError:
        raise _invalid(f"expected a bundle as {FORMS}, got {text!a:.200}") from None
    return Asked(target, source)


def _refuse_second(services: Services) -> None:
    """Raises InputError `aborted`: one at a time, also while one waits for its next try."""
    running = [
        journal.progress.begin.tx for journal in services.journals.read_all()
        if journal.progress.begin.line == LINE and not journal.progress.finished
    ]  # fmt: skip
    if other := (running[0] if running else services.orders.under_way()):
        raise InputError("aborted", f"cannot update the system: transaction {other} is under way")


def _fitting(services: Services, asked: Asked) -> Release:
    """The release that is signed under this name, if this machine can take it."""
    try:
        platform = services.targets.system().slot().platform
    except InstarError as error:
        raise _unfit(f"{error.code}: {error.text.removeprefix('cannot update the system: ')}") from None
    signed = _signed(services, asked.target)
    custom = signed.custom
    if custom.get("kind") != KIND:
        raise InputError("not-found", f"cannot update the system: {asked.target} is signed as something else")
    try:
        release = Release(str(custom["version"]), str(custom["digest"]))
        compatible, arch = [str(name) for name in custom["compatible"]], str(custom["arch"])
    except (KeyError, TypeError, InputError) as error:
        raise _unavailable(
            f"cannot use {asked.target}: it is signed without what a bundle needs ({error})"
        ) from None
    if arch != platform.arch or not set(compatible) & set(platform.hardware):
        text = (
            f"it is for {arch} {'/'.join(compatible)}, this is {platform.arch} {'/'.join(platform.hardware)}"
        )
        raise _unfit(f"wrong-hardware: {text}")
    return release


def _signed(services: Services, target: str) -> TrustedTarget:
    """Raises InputError `not-found`, MachineError `unavailable`."""
    server = services.server()
    try:
        server.fetch_from(read_artifacts(services.layout))
        return server.trusted_target(target)
    except ServerUnreachable as error:
        if error.code == ABSENT:
            raise InputError("not-found", f"cannot update the system: there is no signed {target}") from None
        raise _unavailable(f"{error.code}: {error.text}") from None
    except InstarError as error:
        raise _unavailable(f"{error.code}: {error.text}") from None
    finally:
        server.close()


def _invalid(text: str) -> InputError:
    return InputError("invalid-argument", f"cannot update the system: {text}")


def _unfit(text: str) -> InputError:
    return InputError("failed-precondition", f"cannot update the system: {text}")


def _unavailable(text: str) -> MachineError:
    return MachineError("unavailable", f"cannot update the system: {text}")
