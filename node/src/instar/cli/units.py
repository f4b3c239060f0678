"""The systemd units of a node: the agent stays; the updater is started by its sockets and a timer; a guard looks at
each boot whether a system is on trial.

The updater has a unit of its own: it must not die with the agent that it replaces. A node in /var/lib/instar
uses the units of the Debian package where that is installed; nothing here ever writes to them. Any other
node's are written to /etc/systemd/system. Both start the launcher in the node's state folder.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

from instar.cli.unit_files import API, API_DROP_IN, OS_DROP_IN, UNITS
from instar.core.errors import InputError, MachineError
from instar.core.settings import Settings
from instar.host.config import read_config
from instar.host.files import make_folder, remove, write_atomic
from instar.host.interpreter import command
from instar.host.layout import LINES, Layout

FOLDER = Path("/etc/systemd/system")
PACKAGED = Path("/usr/lib/systemd/system")
PACKAGED_STATE = Path("/var/lib/instar")
RUNNING = Path("/run/systemd/system")  # there if and only if systemd is the service manager, sd_booted(3)
SYSTEMCTL_S = 60.0
TEMPORARY = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - what PrivateTmp= hides, systemd.exec(5)

AGENT, UPDATER = "instar-agent.service", "instar-updater.service"
SOCKET, API_SOCKET, TIMER = "instar-updater.socket", "instar-updater-api.socket", "instar-updater.timer"
GUARD = "instar-boot-guard.service"
TRIGGERS = (SOCKET, TIMER)
ENABLED = (*TRIGGERS, UPDATER, AGENT)
DROP_IN, OS = "instar.conf", "instar-os.conf"
MADE_BY = (
    "# Made by `instar install`; `instar uninstall` removes it.\n"  # an administrator's own has no such line
)


def systemd_runs() -> bool:
    return RUNNING.is_dir()


def no_answer() -> str:
    """Why systemctl cannot do what `write_units` needs; '' when it can, or need not (in a chroot)."""
    try:
        _systemctl("show", "--property=Version")
    except MachineError as error:
        return error.text.partition(": ")[2] or "a systemctl that fails without a word"
    return ""


def packaged(layout: Layout, folder: Path = FOLDER, packages: Path = PACKAGED) -> bool:
    """Whether this node has the package's units. One that was installed before the package keeps its own."""
    return layout.state == PACKAGED_STATE and (packages / AGENT).exists() and not _is_made(folder / AGENT)


def _is_made(path: Path) -> bool:
    """Whether a unit file is one that `instar install` wrote."""
    try:
        return path.read_text().startswith(MADE_BY)
    except (OSError, UnicodeDecodeError):
        return False


def loadable(folder: Path = FOLDER, packages: Path = PACKAGED) -> bool:
    """Whether systemd can be asked about our units: it runs, and there are any."""
    return systemd_runs() and any((place / AGENT).exists() for place in (folder, packages))


def installed(folder: Path = FOLDER, packages: Path = PACKAGED, state: Path = PACKAGED_STATE) -> bool:
    """Whether a node of this machine has units already; there can be one."""
    for name in UNITS:  # what an administrator has put in the place of a packaged one is no node's
        if _is_made(folder / name) or ((folder / name).exists() and not (packages / name).exists()):
            return True
    try:
        manager = json.loads((state / "service.json").read_bytes())["manager"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return manager == "systemd" and (packages / AGENT).exists()


def write_units(layout: Layout, folder: Path = FOLDER) -> str:
    """Write (unless the package has them), load and enable the units; the local socket is listened on when
    this returns. Returns why the updater's API is not; '' when it is, or is not wanted.
    """
    if not packaged(layout, folder):
        for name, text in filled(layout).items():
            if name != API_SOCKET:
                write_atomic(folder / name, f"{MADE_BY}{text}".encode())
    _place_api(layout, folder)
    place_os(layout, folder)
    _systemctl("daemon-reload")
    _systemctl("enable", *ENABLED, *_known((GUARD,), folder))  # an older package has none
    _systemctl("start", *TRIGGERS)
    return _switch_api(layout)


def start_triggers(layout: Layout, folder: Path = FOLDER) -> str:
    """See that sockets and timer are up, that the API listens where config.toml says by now, and that the updater
    may use the slots that it names.

    Returns why it does not; '' when it does, or is not wanted.
    """
    if _place_api(layout, folder):
        _systemctl("daemon-reload")
        for verb in ("stop", "reset-failed"):
            with contextlib.suppress(MachineError):  # not loaded: its file is gone, and it was not up
                _systemctl(verb, API_SOCKET)
        _systemctl("stop", UPDATER)  # a socket cannot be moved below a running updater
    if place_os(layout, folder):
        _systemctl("daemon-reload")
        _systemctl("stop", UPDATER)  # whoever starts it next has it in its new bounds
    _systemctl("start", *TRIGGERS)
    return _switch_api(layout)


def stop_triggers() -> None:
    """Nothing starts the updater any more, before the next start-up or `start_triggers`."""
    if loadable():
        _systemctl("stop", *TRIGGERS, *_known((API_SOCKET,)))


def filled(layout: Layout, python: str = "", api: str = Settings().updater.api) -> dict[str, str]:
    """The text of each unit for this node. `python` is the interpreter; '' is the one that runs this."""
    state = str(layout.state)
    hidden = any(layout.state.is_relative_to(folder) for folder in TEMPORARY)
    words = {
        "writable": _quoted(state),
        "enrolled": _enrolled(layout),  # these three take the rest of their line as it is
        "socket": str(layout.socket("updater")).replace("%", "%%"),
        "slots": str(layout.slots).replace("%", "%%"),
        "private_tmp": "no" if hidden else "yes",
        "api": api,
    }
    for name, verb in (*((role, ("launch", role)) for role in LINES), ("guard", ("boot-guard",))):
        line = command(layout.launcher, *verb, "--state", state)
        line[0] = python or line[0]
        words[name] = " ".join(_quoted(word).replace("$", "$$") for word in line)
    return {name: text.format(**words) for name, text in UNITS.items()}


def _quoted(word: str) -> str:
    """As one word of a unit file: systemd.syntax(7) and, for %, systemd.unit(5)."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return escaped if escaped == word and not set(word) & set(" \t'") else f'"{escaped}"'


# --- where the updater's API listens


def _api(layout: Layout) -> str:
    """As the updater itself reads it: a file that cannot be read leaves the default."""
    try:
        return read_config(layout).updater.api
    except InputError:
        return Settings().updater.api


def _place_api(layout: Layout, folder: Path) -> bool:
    """Write what says where the API listens, beside the packaged unit or as a whole; whether that changed."""
    api = _api(layout)
    if packaged(layout, folder):
        other = api not in ("", Settings().updater.api)
        return _place_drop_in(
            API_DROP_IN.format(api=api) if other else "", folder / f"{API_SOCKET}.d" / DROP_IN
        )
    text = MADE_BY + API.format(api=api, enrolled=_enrolled(layout)) if api else ""
    return _place(folder / API_SOCKET, text)


def place_os(layout: Layout, folder: Path) -> bool:
    """Let the updater use its node's slots, if the settings name any; whether that changed."""
    try:
        settings = read_config(layout).os
    except InputError:
        settings = Settings().os
    text = OS_DROP_IN.format(esp=_quoted(settings.esp)) if settings.disk else ""
    return _place_drop_in(text, folder / f"{UPDATER}.d" / OS)


def _place_drop_in(text: str, drop_in: Path) -> bool:
    changed = _place(drop_in, text)
    if not text:
        with contextlib.suppress(OSError):  # absent, or with something of an operator's in it
            drop_in.parent.rmdir()
    return changed


def _enrolled(layout: Layout) -> str:
    return str(layout.node).replace("%", "%%")


def _place(path: Path, text: str) -> bool:
    """Have `path` hold `text`, or be absent for ''; whether it was not so."""
    old = path.read_text() if path.exists() else ""
    if old == text:
        return False
    if text:
        make_folder(path.parent)
        write_atomic(path, text.encode())
    else:
        remove(path)
    return True


def _switch_api(layout: Layout) -> str:
    """Its own socket may fail: a port that another program has must not keep a node from running."""
    if not _api(layout):
        if _known((API_SOCKET,)):
            _systemctl("disable", "--now", API_SOCKET)
        return ""
    _systemctl("enable", API_SOCKET)
    try:
        _systemctl("start", API_SOCKET)
    except MachineError as error:
        return f"{error.text}; `instar start` tries again"
    return ""


# --- taking them away


def remove_units(folder: Path = FOLDER) -> None:
    """Stop and disable the units, and remove those that are not the package's. Absent ones are fine."""
    present = _known(tuple(UNITS), folder)
    if present and systemd_runs():
        _systemctl("disable", "--now", *present)
        _systemctl("stop", *present)  # only now can neither socket nor timer start the updater again
        with contextlib.suppress(MachineError):  # it complains of units that are not loaded
            _systemctl("reset-failed", *present)
    for name in UNITS:
        if _is_made(folder / name):
            remove(folder / name)
        for wants in folder.glob("*.wants"):  # where the package went before its node, links are left
            remove(wants / name)
    _place_drop_in("", folder / f"{API_SOCKET}.d" / DROP_IN)
    _place_drop_in("", folder / f"{UPDATER}.d" / OS)
    if systemd_runs():
        _systemctl("daemon-reload")


def _known(names: tuple[str, ...], folder: Path = FOLDER, packages: Path = PACKAGED) -> list[str]:
    return [name for name in names if (folder / name).exists() or (packages / name).exists()]


def _systemctl(*words: str) -> None:
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, timeout=SYSTEMCTL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("systemctl-failed", f"cannot {words[0]} the units: {error}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise MachineError("systemctl-failed", f"cannot {words[0]} the units: {said}")
