"""The first line of the control line: what this process is for.

    {"v": 1, "do": "run" | "serve" | "check",
     "module": {"name", "version", "digest", "folder", "runs", "mode", "entry", "stateful"}
             | {"name", "builtin": true},
     "args": {…}, "data": "<folder>" | "", "cwd": "<folder>" | "",
     "limits": {…}, "touches": {"read", "write", "network"}, "user": "<name>" | ""}

The agent has checked the module's files and knows its manifest; here the line's form is checked, no more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from instar.core.errors import InputError
from instar.modules import BUILT_IN
from instar.runner.kinds import KINDS, Limits, ModuleSpec, Touches
from instar.trust.fields import Fields

DO = ("run", "serve", "check")
CODE = "bad-job"
BUILTIN = "builtin"


class Request(NamedTuple):
    do: str
    module: ModuleSpec
    args: dict[str, Any]
    data: str
    cwd: str
    user: str


def parse(message: dict[str, Any], version: str) -> Request:
    """The request in `message`; `version` is the program's. Raises InputError `bad-job`, `unknown-module`."""
    top = Fields(message, "job", CODE)
    if top.get("v", int) != 1:
        raise top.error("expected 'v' 1")
    do = _one_of(top, "do", DO)
    limits, touches = _limits(top), _touches(top)
    given = Fields(top.get("module", dict), "job's module", CODE)
    built_in = given.optional("builtin", False)
    module = _built_in(given, version, limits) if built_in else _module(given, limits, touches)
    if (do == "serve") != (module.mode == "service") and do != "check":
        raise top.error(f"a {module.mode} module cannot be told to {do}")
    args: dict[str, Any] = top.optional("args", {})
    data, cwd = top.optional("data", ""), top.optional("cwd", "")
    if any(path and not path.startswith("/") for path in (data, cwd)):
        raise top.error("expected absolute paths")
    return Request(do, module, args, data, cwd, top.optional("user", ""))


def _built_in(given: Fields, version: str, limits: Limits) -> ModuleSpec:
    name = given.get("name", str)
    if name not in BUILT_IN:
        text = f"cannot run module: expected one of {', '.join(BUILT_IN)}, got {name!a:.80}"
        raise InputError("unknown-module", text)
    return ModuleSpec(name, version, "", "", "", BUILTIN, "oneshot", "", False, limits, Touches())


def _module(given: Fields, limits: Limits, touches: Touches) -> ModuleSpec:
    folder = given.get("folder", str)
    if not folder.startswith("/"):
        raise given.error("expected an absolute folder")
    return ModuleSpec(
        name=given.get("name", str),
        version=given.get("version", str),
        digest=given.get("digest", str),
        folder=folder,
        home=folder,
        runs=_one_of(given, "runs", KINDS),
        mode=_one_of(given, "mode", ("oneshot", "service")),
        entry=given.get("entry", str),
        stateful=given.optional("stateful", False),
        limits=limits,
        touches=touches,
    )


def _limits(top: Fields) -> Limits:
    section, default = Fields(top.optional("limits", {}), "job's limits", CODE), Limits()
    values = {name: section.number(name, getattr(default, name)) for name in Limits._fields}
    if not all(
        0 <= value < 1 << 50 for value in values.values()
    ):  # no infinity, and nothing that is no number
        raise section.error("expected numbers from 0 on")
    return Limits(values.pop("seconds"), **{name: int(value) for name, value in values.items()})


def _touches(top: Fields) -> Touches:
    section = Fields(top.optional("touches", {}), "job's touches", CODE)
    nothing: list[object] = []
    read, write = section.optional("read", nothing), section.optional("write", nothing)
    if not all(isinstance(path, str) for path in (*read, *write)):
        raise section.error("expected paths as texts")
    return Touches(tuple(map(str, read)), tuple(map(str, write)), section.optional("network", False))


def _one_of(fields: Fields, name: str, allowed: tuple[str, ...]) -> str:
    value = fields.get(name, str)
    if value not in allowed:
        raise fields.error(f"expected {name!r} to be one of {', '.join(allowed)}, got {value[:40]!r}")
    return value
