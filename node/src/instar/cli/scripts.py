"""What other service managers than systemd need: an init script, service folders, or program sections.

    sysv         /etc/init.d/instar                 starts the keeper, which keeps agent and updater
    openrc       /etc/init.d/instar                 the same, under supervise-daemon
    runit        /etc/sv/instar-<role>/             the launcher itself, for each role
    supervisor   /etc/supervisor/conf.d/instar.conf, or /etc/supervisord.d/instar.ini: the same

Each works with any state folder whose path its manager can write down (`check_path`).
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
from pathlib import Path

from instar.core.errors import InputError, MachineError
from instar.host.files import make_folder, remove, remove_tree, write_atomic
from instar.host.interpreter import command
from instar.host.layout import LINES, Layout
from instar.host.services.base import GRACE_S, call
from instar.host.services.runit import FOLDER, scanned_folder

ROOT = Path("/")
SCRIPT = Path("/etc/init.d/instar")
SUPERVISOR = (  # where its own configuration, as distributions have it, looks for more
    (Path("/etc/supervisor/conf.d"), "instar.conf"),
    (Path("/etc/supervisord.d"), "instar.ini"),
)
MADE_BY = "# Made by `instar install`; `instar uninstall` removes it."

SYSV = """\
#!/bin/sh
### BEGIN INIT INFO
# Provides:          instar
# Required-Start:    $remote_fs $network
# Required-Stop:     $remote_fs $network
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: Instar agent and updater
### END INIT INFO
{made_by}

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH

keep() {{
    {keep} --by sysv "$1"
}}

case "$1" in
    start)
        keep --detach
        ;;
    stop)
        keep --end
        ;;
    restart|force-reload)
        keep --end && keep --detach
        ;;
    status)
        keep --check
        ;;
    *)
        echo "usage: $0 start|stop|restart|force-reload|status" >&2
        exit 2
        ;;
esac
"""

# `command` and what follows are evaluated once more by OpenRC: that is why they are quoted twice.
OPENRC = """\
#!/sbin/openrc-run
{made_by}

description="Instar agent and updater"
supervisor=supervise-daemon
command={openrc_command}
command_args={openrc_arguments}
pidfile=/run/instar.pid
output_log={openrc_log}
error_log={openrc_log}
retry=TERM/{both_s}/KILL/5
respawn_delay=5
respawn_max=0

depend() {{
    use net
    after bootmisc
}}

stop_post() {{
    {keep} --end
}}
"""

RUN = """\
#!/bin/sh
{made_by}
exec 2>&1 </dev/null
exec {launch}
"""

LOG_RUN = """\
#!/bin/sh
{made_by}
exec svlogd -tt {log}
"""

# It never gives up: what keeps a launcher from starting may pass, and nobody comes to look.
PROGRAM = """\
[program:instar-{role}]
command={launch}
directory=/
autostart=true
autorestart=true
startsecs=1
startretries=2000
stopsignal=TERM
stopwaitsecs={grace_s}
redirect_stderr=true
stdout_logfile={log}
stdout_logfile_maxbytes=4MB
stdout_logfile_backups=1
"""


def found(root: Path = ROOT) -> str:
    """The service manager that this machine runs, other than systemd; 'none' where there is none."""
    names = {path: name for path in root.glob("proc/[0-9]*/comm") if (name := _read(path).strip())}
    first = _read(root / "proc/1/comm").strip()
    if (root / "run/openrc/softlevel").exists():
        return "openrc"
    if first == "runit":
        return "runit"
    if first == "init" and (root / "etc/init.d").is_dir() and _has(root, "service"):
        return "sysv"
    if "runsvdir" in names.values() and _has(root, "sv"):
        return "runit"
    if "supervisord" in names.values() and _has(root, "supervisorctl"):
        return "supervisor"
    return "none"


def check_path(manager: str, state: Path) -> None:
    """Raise InputError `bad-path` when the manager's files cannot hold the path of the state folder."""
    text = str(state)
    refused = "#;%" if manager == "supervisor" else ""  # no quotes keep it from reading more into these
    bad = next((c for c in text if not c.isprintable() or c in refused), None)
    if bad is not None:
        words = (
            f"cannot install for {manager}: expected a state folder without {bad!a} in its path, got {text!a}"
        )
        raise InputError("bad-path", words)


def installed(manager: str, root: Path = ROOT) -> bool:
    """Whether a node of this machine has the files of this manager already; there can be one."""
    return any(path.exists() or path.is_symlink() for path in _paths(manager, root))


def write(manager: str, layout: Layout, root: Path = ROOT) -> None:
    """Write the manager's files and have it start them with the machine. Nothing is started yet.

    Raises MachineError; what was written is then for `remove_all` to take away.
    """
    for path, (text, mode) in filled(manager, layout, root).items():
        make_folder(path.parent)
        write_atomic(path, text.encode(), mode)
    if manager == "runit":
        for role in LINES:
            make_folder(_log_folder(layout, role), 0o700)
    if manager == "sysv":
        _enable_sysv()
    if manager == "openrc":
        call(["rc-update", "add", "instar", "default"], "have OpenRC start instar")


def filled(manager: str, layout: Layout, root: Path = ROOT) -> dict[Path, tuple[str, int]]:
    """Path -> text and mode of each file for this node."""
    keep = command(layout.launcher, "keep", "--state", str(layout.state))
    words = {"made_by": MADE_BY, "keep": shlex.join(keep)}
    if manager == "sysv":
        return {_below(root, SCRIPT): (SYSV.format(**words), 0o755)}
    if manager == "openrc":
        words |= {
            "openrc_command": shlex.quote(shlex.quote(keep[0])),
            "openrc_arguments": shlex.quote(shlex.join([*keep[1:], "--by", "openrc"])),
            "openrc_log": shlex.quote(shlex.quote(str(layout.run / "keeper.log"))),
            "both_s": f"{2 * GRACE_S + 5:.0f}",
        }
        return {_below(root, SCRIPT): (OPENRC.format(**words), 0o755)}
    if manager == "runit":
        return _runit_files(layout, root)
    return {path: (_programs(layout), 0o644) for path in _paths(manager, root)}


def _runit_files(layout: Layout, root: Path) -> dict[Path, tuple[str, int]]:
    files = {}
    for role in LINES:
        folder = _below(root, FOLDER) / f"instar-{role}"
        log = shlex.quote(str(_log_folder(layout, role)))
        files[folder / "run"] = RUN.format(made_by=MADE_BY, launch=shlex.join(_launch(layout, role))), 0o755
        files[folder / "log/run"] = LOG_RUN.format(made_by=MADE_BY, log=log), 0o755
    return files


def _programs(layout: Layout) -> str:
    """supervisor splits a command as a shell does."""
    sections = (
        PROGRAM.format(
            role=role,
            launch=shlex.join(_launch(layout, role)),
            log=layout.run / f"{role}.log",
            grace_s=f"{GRACE_S:.0f}",
        )
        for role in LINES
    )
    return "\n".join((f"; {MADE_BY[2:]}\n", *sections))


def _launch(layout: Layout, role: str) -> list[str]:
    return command(layout.launcher, "launch", role, "--state", str(layout.state))


def _log_folder(layout: Layout, role: str) -> Path:
    return layout.run / f"{role}-log"


def remove_all(manager: str, root: Path = ROOT) -> None:
    """Take back what `write` and the first start made; the daemons have been stopped. Absent is fine."""
    if not installed(manager, root):
        return
    if manager == "runit":
        _remove_runit(root)
        return
    paths = _paths(manager, root)
    if manager == "openrc":
        with contextlib.suppress(MachineError):
            call(["rc-update", "--all", "del", "instar"], "have OpenRC forget instar")
    for path in paths:
        remove(path)
    if manager == "sysv":
        _disable_sysv()
    if manager == "supervisor":
        for words in (["remove", "instar-agent"], ["remove", "instar-updater"], ["reread"]):
            with contextlib.suppress(MachineError):  # it complains of programs that were never started
                call(["supervisorctl", *words], f"{words[0]} the programs")


def _remove_runit(root: Path) -> None:
    """The link goes first: runsvdir would start a runsv that has ended again."""
    for role in LINES:
        folder = _below(root, FOLDER) / f"instar-{role}"
        with contextlib.suppress(MachineError):
            remove(scanned_folder(root / "proc") / folder.name)
        if (folder / "supervise/ok").exists():
            with contextlib.suppress(MachineError):
                call(["sv", "-w", f"{GRACE_S:.0f}", "force-shutdown", str(folder)], f"end the {role}'s runsv")
        remove_tree(folder)


def _paths(manager: str, root: Path) -> list[Path]:
    if manager in ("sysv", "openrc"):
        return [_below(root, SCRIPT)]
    if manager == "runit":
        return [_below(root, FOLDER) / f"instar-{role}" for role in LINES]
    if manager == "supervisor":
        known = [(_below(root, folder), name) for folder, name in SUPERVISOR]
        return [next((folder / name for folder, name in known if folder.is_dir()), known[0][0] / known[0][1])]
    return []


# Debian, and what descends from Red Hat; elsewhere the script's links, if it needs any, are the operator's.
ENABLE = (
    ("update-rc.d", ["instar", "defaults"], ["instar", "remove"]),
    ("chkconfig", ["--add", "instar"], ["--del", "instar"]),
)


def _enable_sysv() -> None:
    for program, enable, _ in ENABLE:
        if shutil.which(program):
            call([program, *enable], "have the machine start instar")
            return


def _disable_sysv() -> None:
    for program, _, disable in ENABLE:
        if shutil.which(program):
            with contextlib.suppress(MachineError):
                call([program, *disable], "have the machine forget instar")
            return


def _below(root: Path, path: Path) -> Path:
    return root / str(path).lstrip("/")


def _has(root: Path, program: str) -> bool:
    return any((root / folder / program).exists() for folder in ("usr/sbin", "usr/bin", "sbin", "bin"))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
