"""service.status: in which state the machine's services are, by whatever manages them.

    args   {"names": ["ssh", "cron"], "failed": false}
    reply  {"manager": "systemd", "services": [{"name", "state", "detail", "pid", …}], "cut": 0, "text"}

`state` is running, finished (a one-time service that did its work), stopped, failed, starting, stopping,
not-found or unknown; `detail` is the manager's own word. Without `names` all services are told of, without
those that the manager only knows by name. `manager` is systemd, openrc, runit, sysv or none; then `text`
says what there is instead. Only systemd is asked by a program; the others keep files that tell.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST_NAMES = 100
MOST_REPLY = 200_000  # bytes of JSON
MOST_OUTPUT = 8 << 20  # bytes of systemctl
ANSWER_S = 10.0  # of systemctl; a message bus that is stuck must not hold us
NAME = re.compile(r"[A-Za-z0-9:_.@\\][A-Za-z0-9:_.@\\+-]{0,254}")
UNIT = re.compile(r".\.(service|socket|target|timer|mount|automount|swap|path|slice|scope|device)$")
PROPERTIES = {
    "Id": "name", "Description": "description", "LoadState": "load", "ActiveState": "active", "SubState": "sub",
    "MainPID": "pid", "UnitFileState": "enabled", "NRestarts": "restarts", "Result": "result",
    "ExecMainStatus": "exit_status", "ActiveEnterTimestampMonotonic": "since",
}  # fmt: skip
ROOT = Path("/")


def run(args: dict[str, Any], context: Any, root: Path = ROOT) -> dict[str, Any]:
    """Raises ValueError for arguments that cannot be used, OSError when the manager does not answer."""
    names, failed = _arguments(args)
    manager = find_manager(root)
    if manager == "none":
        services = [{"name": name, "state": "unknown", "detail": "no manager", "pid": 0} for name in names]
        return {"manager": manager, "services": services, "cut": 0, "text": _instead(root)}
    ask = {"systemd": _systemd, "openrc": _openrc, "runit": _runit, "sysv": _sysv}[manager]
    services = sorted(ask(root, names, failed), key=lambda service: str(service["name"]))
    if failed:
        services = [service for service in services if service["state"] == "failed"]
    fitting = _fit(services)
    return {"manager": manager, "services": fitting, "cut": len(services) - len(fitting), "text": ""}


def _arguments(args: dict[str, Any]) -> tuple[list[str], bool]:
    if unknown := sorted(set(args) - {"names", "failed"}):
        raise ValueError(f"cannot look at services: expected 'names' or 'failed', got {unknown[0]!a:.80}")
    names, failed = args.get("names", []), args.get("failed", False)
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or len(names) > MOST_NAMES:
        raise ValueError(f"cannot look at services: expected a list of at most {MOST_NAMES} texts as 'names'")
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(f"cannot look at services: expected a service's name, got {name!a:.80}")
    if not isinstance(failed, bool):
        raise ValueError(f"cannot look at services: expected true or false as 'failed', got {failed!a:.80}")
    return names, failed


def find_manager(root: Path) -> str:
    """What manages services here, by the files that only its running instance makes."""
    if (root / "run/systemd/system").is_dir():
        return "systemd"
    if (root / "run/openrc/softlevel").exists():
        return "openrc"
    if _runit_folder(root) is not None and _runs(root, "runsvdir"):
        return "runit"
    if _first_process(root) == "init" and (root / "etc/init.d").is_dir():
        return "sysv"
    return "none"


def _first_process(root: Path) -> str:
    return _line(root / "proc/1/comm")


def _runs(root: Path, name: str) -> bool:
    """Whether a process of that name runs, as process 1 or below another one."""
    return any(
        _line(root / "proc" / pid / "comm") == name for pid in _names(root / "proc") if pid.isdecimal()
    )


def _instead(root: Path) -> str:
    first = _first_process(root) or "unknown"
    return (
        f"no service manager was found: expected systemd, openrc, runit or sysv, process 1 is {first!a:.40}"
    )


def _fit(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many from the front as one reply holds."""
    room = MOST_REPLY
    for number, item in enumerate(items):
        room -= len(json.dumps(item)) + 2
        if room < 0:
            return items[:number]
    return items


# --- systemd


def _systemd(root: Path, names: list[str], failed: bool) -> list[dict[str, Any]]:
    if names:
        wanted = [name if UNIT.search(name) else f"{name}.service" for name in names]
    else:
        words = ["list-units", "--type=service", "--all", "--plain", "--no-legend", "--full"]
        lines = _systemctl([*words, *(["--state=failed"] if failed else [])]).splitlines()
        wanted = [line.split()[0] for line in lines if line.strip()]
    found: list[dict[str, Any]] = []
    for at in range(0, len(wanted), MOST_NAMES):
        shown = ["show", f"--property={','.join(PROPERTIES)}", "--", *wanted[at : at + MOST_NAMES]]
        blocks = _systemctl(shown).strip("\n").split("\n\n")
        found += [_unit(block) for block in blocks if block]
    return [unit for unit in found if names or unit["state"] != "not-found"]


def _systemctl(words: list[str]) -> str:
    command = ["systemctl", "--no-pager", "--no-ask-password", "--system", *words]
    world = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}
    try:
        done = subprocess.run(
            command, env=world, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        text = f"cannot ask systemd: expected an answer within {ANSWER_S:g} s, got none"
        raise OSError(text) from None
    said = done.stdout[:MOST_OUTPUT].decode("utf-8", "backslashreplace")
    if done.returncode != 0 and not said.strip() and done.stderr.strip():
        why = done.stderr.decode("utf-8", "backslashreplace").strip().splitlines()[0]
        raise OSError(f"cannot ask systemd: {why:.200}")
    return said


def _unit(block: str) -> dict[str, Any]:
    values = dict.fromkeys(PROPERTIES.values(), "")
    for line in block.splitlines():
        name, _, value = line.partition("=")
        if name in PROPERTIES:
            values[PROPERTIES[name]] = value
    service: dict[str, Any] = {
        "name": values["name"].removesuffix(".service"),
        "state": _unit_state(values),
        "detail": f"{values['active']} ({values['sub']})",
        "pid": _number(values["pid"]),
        "enabled": values["enabled"],
        "restarts": _number(values["restarts"]),
        "description": values["description"][:200],
    }
    if service["state"] == "failed":
        service |= {"result": values["result"], "exit_status": _number(values["exit_status"])}
    if service["state"] == "running" and (since := _number(values["since"])):
        service["for_s"] = max(0, int(time.clock_gettime(time.CLOCK_MONOTONIC)) - since // 1_000_000)
    return service


def _unit_state(values: dict[str, str]) -> str:
    if values["load"] in ("not-found", "masked") and values["active"] == "inactive":
        return "not-found" if values["load"] == "not-found" else "stopped"
    if values["active"] == "active":
        return "finished" if values["sub"] == "exited" else "running"
    states = {
        "reloading": "running", "refreshing": "running", "activating": "starting", "deactivating": "stopping",
        "inactive": "stopped", "failed": "failed",
    }  # fmt: skip
    return states.get(values["active"], "unknown")


# --- openrc: one folder for each state, with a link for each service


def _openrc(root: Path, names: list[str], failed: bool) -> list[dict[str, Any]]:
    folders = (
        ("failed", "failed"), ("starting", "starting"), ("stopping", "stopping"), ("inactive", "starting"),
        ("started", "running"),
    )  # fmt: skip
    found = []
    for name in names or _scripts(root):
        marks = [
            (word, state) for word, state in folders if os.path.lexists(root / "run/openrc" / word / name)
        ]
        word, state = marks[0] if marks else ("stopped", "stopped")
        if state == "stopped" and not (root / "etc/init.d" / name).exists():
            word, state = "no script", "not-found"
        pid = 0
        if word == "started":
            pids = _openrc_pids(root, name)
            pid = next((pid for pid in pids if _alive(root, pid)), 0)
            if pids and not pid:
                word, state = "crashed", "failed"
        found.append({"name": name, "state": state, "detail": word, "pid": pid})
    return found


def _openrc_pids(root: Path, name: str) -> list[int]:
    """Of the daemons that start-stop-daemon has noted for a service, or whose file the script has named."""
    files = [_line(root / "run/openrc/options" / name / "pidfile")]
    for note in _files(root / "run/openrc/daemons" / name):
        files += [line.partition("=")[2] for line in _text(note).splitlines() if line.startswith("pidfile=")]
    pids = (_number(_line(root / file.lstrip("/"))) for file in files if file.startswith("/"))
    return [pid for pid in pids if pid]


# --- runit: supervise/status below each service, 20 bytes: time (12), pid (4, little-endian), paused, want, term, state


def _runit_folder(root: Path) -> Path | None:
    places = ("etc/runit/runsvdir/current", "run/runit/service", "var/service", "etc/service", "service")
    return next((root / place for place in places if (root / place).is_dir()), None)


def _runit(root: Path, names: list[str], failed: bool) -> list[dict[str, Any]]:
    folder = _runit_folder(root)
    if folder is None:
        return []
    return [
        {"name": name, **_supervised(folder / name)}
        for name in names or [path.name for path in _files(folder) if path.is_dir()]
    ]


def _supervised(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        return {"state": "not-found", "detail": "no folder", "pid": 0}
    raw = _bytes(folder / "supervise/status")
    if len(raw) < 20:
        return {"state": "unknown", "detail": "not supervised, or not readable", "pid": 0}
    word = {0: "down", 1: "run", 2: "finish"}.get(raw[19], str(raw[19]))
    state = {"run": "running", "down": "stopped", "finish": "stopping"}.get(word, "unknown")
    wanted = chr(raw[17])
    if state == "stopped" and wanted == "u":
        state, word = "failed", "down, wanted up"
    return {"state": state, "detail": word, "pid": int.from_bytes(raw[12:16], "little")}


# --- sysv: nothing but scripts and process ids


def _sysv(root: Path, names: list[str], failed: bool) -> list[dict[str, Any]]:
    """A script without a file that holds a process id may run or not: nobody noted it."""
    found = []
    for name in names or _scripts(root):
        if not (root / "etc/init.d" / name).exists():
            found.append({"name": name, "state": "not-found", "detail": "no script", "pid": 0})
            continue
        notes = [root / f"run/{name}.pid", root / f"run/{name}/{name}.pid", root / f"run/{name}d.pid"]
        pid = next((number for note in notes if (number := _number(_line(note)))), 0)
        if not pid:
            state, detail = "unknown", "no process id is noted"
        elif _alive(root, pid):
            state, detail = "running", "its process lives"
        else:
            state, detail = "failed", "its process is gone"
        found.append(
            {"name": name, "state": state, "detail": detail, "pid": pid if state == "running" else 0}
        )
    return found


# --- files


def _scripts(root: Path) -> list[str]:
    """Services by their scripts; not what packages left behind, nor the run level's own."""
    no = {"README", "skeleton", "functions.sh", "rc", "rcS", "halt", "reboot", "single", "killprocs"}
    names = (path.name for path in _files(root / "etc/init.d") if path.is_file() and os.access(path, os.X_OK))
    return [name for name in names if name not in no and NAME.fullmatch(name) and ".dpkg-" not in name]


def _files(folder: Path) -> Iterable[Path]:
    return [folder / name for name in _names(folder)[:5000]]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(65_536)
    except OSError:
        return b""


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8", "backslashreplace")


def _line(path: Path) -> str:
    return (_text(path).splitlines() or [""])[0].strip()


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def _alive(root: Path, pid: int) -> bool:
    """Not gone, and not a zombie that nobody has waited for yet."""
    state = _text(root / "proc" / str(pid) / "stat").rpartition(")")[2].split()
    return bool(state) and state[0] not in ("Z", "X")
