"""The modules that the courses run: a service that remembers, and a one-shot that leaves a mark."""

from __future__ import annotations

from pathlib import Path

from instar_lab.server import LabServer

MEMORY, MARK = "lab.memory", "lab.mark"
GOOD, BETTER, BAD = "1.0.0", "1.1.0", "1.2.0"

SERVICE = """\
name = "lab.memory"
version = "{version}"
about = "Adds up what it is told, and remembers."
runs = "python"
mode = "service"
stateful = true
entry = {{ any = "module.py" }}

[timeouts]
ready_s = 10.0
stop_s = 5.0
"""
ONESHOT = """\
name = "lab.mark"
version = "1.0.0"
about = "Writes down that it ran."
runs = "python"
mode = "oneshot"
entry = { any = "module.py" }

[timeouts]
run_s = 30.0

[touches]
write = ["/tmp"]
"""
REMEMBERS = '''\
"""Version {version}: what it was told stays told, however it ends."""

import time

state = {{"sum": 0, "starts": 0}}


def start(context):
    state.update(context.load() or {{}})
    state["starts"] += 1
    context.save(state)


def request(args, context):
    state["sum"] += args.get("add", 0)
    context.save(state)
    time.sleep(args.get("seconds", 0.0))
    return dict(state)
'''
FALLS = "\n\ndef step(context):\n    raise SystemExit(3)\n"
MARKS = '''\
"""One line for each time that it ran."""

import os
import time


def run(args, context):
    file = os.open(args["file"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, f"{args['n']}\\n".encode())
    os.close(file)
    end = time.monotonic() + args.get("seconds", 0.0)
    while time.monotonic() < end:
        context.log("still here")
        time.sleep(0.05)
    return {"n": args["n"]}
'''


def publish(server: LabServer, folder: Path) -> None:
    """Make them below `folder` and publish them: two good releases of the service, and one that falls."""
    for version in (GOOD, BETTER, BAD):
        body = REMEMBERS.format(version=version) + (FALLS if version == BAD else "")
        server.publish_module(_made(folder / f"memory-{version}", SERVICE.format(version=version), body))
    server.publish_module(_made(folder / "mark", ONESHOT, MARKS))


def _made(folder: Path, manifest: str, body: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "module.toml").write_text(manifest)
    (folder / "module.py").write_text(body)
    return folder


def marks(file: Path, n: int) -> int:
    """How often the one-shot ran with this number."""
    lines = file.read_text().split() if file.exists() else []
    return lines.count(str(n))
