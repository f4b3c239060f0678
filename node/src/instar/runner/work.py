"""One runner process, from the first line of its control line to its exit status; cold and warm are the same.

    run    {"log"}*, {"progress", "text"}*, then {"ok": true, "reply"} or {"ok": false, "error"}
    check  the same; the reply is {}
    serve  {"state": "starting"}, {"state": "ready"}, then as service.py says; an end that nobody asked for is
           {"state": "failed", "text"} and {"ok": false, "error"}

Exit 0 only with a good end. Errors of the module are its fault and never an exception of this process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from instar.core.errors import InstarError
from instar.modules.context import Context
from instar.runner import bounds, kinds
from instar.runner.border import call, flush, tell
from instar.runner.kinds import Kind, Loaded, ModuleSpec
from instar.runner.line import GONE, ControlLine, Voice
from instar.runner.reply import encode_reply
from instar.runner.request import Request, parse
from instar.version import VERSION

FIRST_WITHIN_S = 30.0


def work(program: str, announce: Callable[[ModuleSpec], None] | None = None) -> int:
    """Do what the agent says on descriptor 3; returns the exit status. `bounds.settle` comes before.

    `announce` is told before a module is loaded. Raises OSError when there is no control line.
    """
    line = ControlLine()
    request: Request | None = None
    try:
        message = line.first(FIRST_WITHIN_S)
        if message is None:
            return GONE
        request = parse(message, VERSION)
        kind = _import(request)
        request = bounds.apply(request)
        line.wait(0)
        if line.ended:  # the agent died before the kernel was asked to end us with it
            return GONE
        if announce is not None:
            announce(request.module)
        _do(request, kind, line, program)
    except InstarError as error:
        return _fail(line, error, request is not None and request.do == "serve")
    except MemoryError:
        small = InstarError("out-of-memory", "cannot run module: its limit of memory is too small")
        return _fail(line, small, request is not None and request.do == "serve")
    return 0


def _import(request: Request) -> Kind:
    """All of the program that will be needed: the module's user may not be able to read it."""
    if request.data:
        import instar.host.files
    if request.do == "serve":
        import instar.runner.service  # noqa: F401
    return kinds.find(request.module)


def _do(request: Request, kind: Kind, line: ControlLine, program: str) -> None:
    module = request.module
    voice = Voice(line, module.limits.output)
    context = Context(module.name, module.version, voice.emit, program, request.data, request.args)
    _line_by_line()
    if request.do == "serve":
        from instar.runner.service import Service

        line.say({"state": "starting"})
        Service(line, voice, _load(kind, module, context), context).run()
    elif request.do == "check":
        _check(kind, module, context)
        answer(line, voice, b'{"ok":true,"reply":', b"{}")
    else:
        loaded = _load(kind, module, context)
        returned = call("run module", loaded.run, request.args, context)
        answer(line, voice, b'{"ok":true,"reply":', reply_of(context, returned))


def _load(kind: Kind, module: ModuleSpec, context: Context) -> Loaded:
    return call("load module", kind.load, module, context)


def _check(kind: Kind, module: ModuleSpec, context: Context) -> None:
    """Rehearse a module: whatever can be wrong with its code and its start shows here."""
    loaded = _load(kind, module, context)
    if module.mode == "service":
        call("start module", loaded.start, context)
        call("stop module", loaded.stop, context)


def reply_of(context: Context, returned: object) -> bytes:
    """The reply: what was built in pieces, and over it what was returned. Raises InstarError `bad-reply`."""
    built: dict[str, Any] = context.take_built()
    if isinstance(returned, dict):
        return call("use reply", encode_reply, {**built, **returned})
    return encode_reply(built if returned is None else returned)


def answer(line: ControlLine, voice: Voice, head: bytes, body: bytes) -> None:
    """Send the reply; what the module printed before is out by then. Raises InstarError `too-much-output`."""
    voice.count(len(body))
    flush()
    line.say_raw(head + body + b"}\n")


def _fail(line: ControlLine, error: InstarError, service: bool) -> int:
    tell(error.text)
    flush()
    try:
        if service:
            line.say({"state": "failed", "text": error.text})
        line.say({"ok": False, "error": error.as_json()})
    except InstarError as closed:
        tell(closed.text)
    return error.exit_status


def _line_by_line() -> None:
    """What is printed is out at once: of a module that crashes, the last words are what helps."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
