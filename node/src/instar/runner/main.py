"""`runner`: read one job from standard input, run its module, write one reply.

    in   {"v": 1, "module", "args": {…}, "limits": {"seconds", "memory", "files"}}
    out  {"ok": true, "reply": {…}}  or  {"ok": false, "error": {"code", "text"}}

Exit 0 only with a reply. What the module prints goes to standard error: the reply keeps standard
output for itself. Import diet: standard library, and the module that was asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, InstarError
from instar.modules import BUILT_IN, Context
from instar.version import VERSION
from instar.wire.messages import MAX_FRAME

MEMORY = 2 << 30  # bytes of address space
FILES = 256
SPARE_S = 2  # past its deadline, a runner whose agent died ends itself
MOST_REQUEST = 2 * MAX_FRAME


def main(argv: list[str]) -> int:
    if argv:
        print("cannot run: expected no arguments, the job comes on standard input", file=sys.stderr)
        return InputError.exit_status
    reply_fd = _keep_reply_channel()
    try:
        module, args, limits = _read_job(sys.stdin.buffer.read(MOST_REQUEST + 1))
        _limit(limits)
        body = _encode({"ok": True, "reply": _run(module, args)})
        status = 0
    except InstarError as error:
        print(error.text, file=sys.stderr)
        body, status = _encode({"ok": False, "error": error.as_json()}), error.exit_status
    view = memoryview(body)
    while view:
        view = view[os.write(reply_fd, view) :]
    return status


def _keep_reply_channel() -> int:
    """A private descriptor for the reply; descriptor 1 becomes standard error, for prints at any level."""
    reply_fd = os.dup(1)  # not inherited by the module's own children
    os.dup2(2, 1)
    return reply_fd


def _read_job(raw: bytes) -> tuple[str, dict[str, Any], dict[str, Any]]:
    try:
        job = json.loads(raw)
        module, args, limits = job["module"], job.get("args", {}), job.get("limits", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"cannot read job: expected an object with 'module', got {type(error).__name__}"
        raise InputError("bad-job", text) from error
    if not isinstance(module, str) or not isinstance(args, dict) or not isinstance(limits, dict):
        raise InputError("bad-job", "cannot read job: expected text and objects, got other values")
    if module not in BUILT_IN:
        text = f"cannot run module: expected one of {', '.join(BUILT_IN)}, got {module!a:.80}"
        raise InputError("unknown-module", text)
    return module, args, limits


def _limit(limits: dict[str, Any]) -> None:
    """Bound this process from inside, so that it ends even when its agent is gone."""
    try:
        seconds = int(float(limits.get("seconds", 60)))
        memory, files = int(limits.get("memory", MEMORY)), int(limits.get("files", FILES))
    except (ValueError, TypeError, OverflowError) as error:
        text = "cannot read job: expected numbers as limits, got other values"
        raise InputError("bad-job", text) from error
    seconds = max(1, seconds) + SPARE_S
    signal.alarm(seconds)
    for kind, wanted in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (bound, bound))


def _run(module: str, args: dict[str, Any]) -> dict[str, Any]:
    """Run the module. Whatever it raises is the module's fault and becomes InstarError `module-failed`."""
    context = Context(Path(sys.argv[0]).resolve(), VERSION)
    try:
        reply = importlib.import_module(f"instar.modules.{module}").run(args, context)
    except InstarError:
        raise
    except MemoryError as error:
        raise InstarError(
            "out-of-memory", "cannot run module: it wanted more memory than its limit"
        ) from error
    except Exception as error:  # a module may raise anything; this is its border
        traceback.print_exc()
        raise InstarError("module-failed", f"cannot run module: it raised {type(error).__name__}") from error
    if not isinstance(reply, dict):
        raise InstarError("bad-reply", f"cannot use reply: expected an object, got {type(reply).__name__}")
    return reply


def _encode(answer: dict[str, Any]) -> bytes:
    try:
        return json.dumps(answer, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        text = f"cannot use reply: expected JSON values, got {error!s:.80}"
        raise InstarError("bad-reply", text) from error
