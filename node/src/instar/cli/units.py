"""The systemd units of a node: the agent stays; the updater is started by its socket and a timer.

The updater has a unit of its own: it must not die with the agent that it replaces.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from instar.core.errors import MachineError
from instar.host.files import remove, write_atomic
from instar.host.interpreter import command
from instar.host.layout import LINES, Layout

FOLDER = Path("/etc/systemd/system")
RUNNING = Path("/run/systemd/system")  # there if and only if systemd is the service manager, sd_booted(3)
SYSTEMCTL_S = 60.0
TEMPORARY = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - what PrivateTmp= hides, systemd.exec(5)

# Not for either: ProtectKernelTunables and ProtectControlGroups. Inside systemd-nspawn (systemd 252) a unit
# that has one of them reads the boot id of the host, not of the container: `instar status` and `instar
# install`, which run outside the unit, would then take its daemons for those of another boot.

# The agent keeps its capabilities, its view of the devices and its system calls: what jobs and modules are
# sent to do is not known here. They may not do what only the machine's own start-up should. Its own part of
# the cgroup tree is for the limits of modules and jobs. A stop is told to the agent alone, which ends them in
# order; what is left of them when it is gone is killed.
AGENT = """\
[Unit]
Description=Instar agent
After=network.target
StartLimitIntervalSec=0

[Service]
ExecStart={agent}
Restart=always
RestartSec=200ms
TimeoutStopSec=10s
KillMode=mixed
Delegate=yes
OOMPolicy=continue
NoNewPrivileges=yes
PrivateTmp={private_tmp}
ProtectSystem=strict
ReadWritePaths={writable}
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes

[Install]
WantedBy=multi-user.target
"""

# The updater starts at each boot, without waiting for its timer: a trial that a reboot cut short goes on.
# It fetches, writes below the state folder, and restarts the agent through systemctl: that needs
# systemd's socket and the same user, but no capability. The only one that stays is CAP_DAC_OVERRIDE: an
# operator may have given config.toml, or the folder, to another user. Left out on purpose:
# - ProtectProc: without CAP_SYS_PTRACE it would hide the agent, whose start time tells it apart;
# - MemoryDenyWriteExecute: with an older libffi it breaks ctypes, and rehearsals run in here.
UPDATER = """\
[Unit]
Description=Instar updater
After=network.target
StartLimitIntervalSec=0

[Service]
ExecStart={updater}
Restart=on-failure
RestartSec=200ms
TimeoutStopSec=10s
CapabilityBoundingSet=CAP_DAC_OVERRIDE
NoNewPrivileges=yes
PrivateDevices=yes
PrivateTmp={private_tmp}
ProtectSystem=strict
ReadWritePaths={writable}
ProtectClock=yes
ProtectHome=read-only
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""

# A socket that has reached its trigger limit stays dead until somebody comes; the updater would be woken by
# its timer only.
SOCKET = """\
[Unit]
Description=Instar updater's local socket

[Socket]
ListenStream={socket}
SocketMode=0600
TriggerLimitIntervalSec=0

[Install]
WantedBy=sockets.target
"""

TIMER = """\
[Unit]
Description=Instar updater looks by itself

[Timer]
OnBootSec=30s
OnUnitInactiveSec=300s
RandomizedDelaySec=30s
AccuracySec=1s

[Install]
WantedBy=timers.target
"""

UNITS = {
    "instar-agent.service": AGENT,
    "instar-updater.service": UPDATER,
    "instar-updater.socket": SOCKET,
    "instar-updater.timer": TIMER,
}
ENABLED = ("instar-updater.socket", "instar-updater.timer", "instar-updater.service", "instar-agent.service")


def systemd_runs() -> bool:
    return RUNNING.is_dir()


def installed(folder: Path = FOLDER) -> bool:
    """Whether a node of this machine has units already; there can be one."""
    return any((folder / name).exists() for name in UNITS)


def write_units(layout: Layout, folder: Path = FOLDER) -> None:
    """Write, load and enable the units; the socket is listened on when this returns."""
    for name, text in filled(layout).items():
        write_atomic(folder / name, text.encode())
    _systemctl("daemon-reload")
    _systemctl("enable", *ENABLED)
    _systemctl("start", "instar-updater.socket", "instar-updater.timer")


def filled(layout: Layout) -> dict[str, str]:
    """The text of each unit for this node."""
    state = str(layout.state)
    hidden = any(layout.state.is_relative_to(folder) for folder in TEMPORARY)
    words = {
        "writable": _quoted(state),
        "socket": str(layout.socket("updater")).replace("%", "%%"),  # takes the rest of its line as it is
        "private_tmp": "no" if hidden else "yes",
    }
    for role in LINES:
        line = command(layout.launcher, "launch", role, "--state", state)
        words[role] = " ".join(_quoted(word).replace("$", "$$") for word in line)
    return {name: text.format(**words) for name, text in UNITS.items()}


def _quoted(word: str) -> str:
    """As one word of a unit file: systemd.syntax(7) and, for %, systemd.unit(5)."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return escaped if escaped == word and not set(word) & set(" \t'") else f'"{escaped}"'


def remove_units(folder: Path = FOLDER) -> None:
    """Stop, disable and remove the units. Absent ones are fine."""
    present = [name for name in UNITS if (folder / name).exists()]
    if present:
        _systemctl("disable", "--now", *[name for name in ENABLED if name in present])
        _systemctl("stop", *present)  # only now can neither socket nor timer start the updater again
        with contextlib.suppress(MachineError):  # it complains of units that are not loaded
            _systemctl("reset-failed", *present)
    for name in present:
        remove(folder / name)
    _systemctl("daemon-reload")


def _systemctl(*words: str) -> None:
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, timeout=SYSTEMCTL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("systemctl-failed", f"cannot {words[0]} the units: {error}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise MachineError("systemctl-failed", f"cannot {words[0]} the units: {said}")
