"""The systemd units of a node: the agent stays; the updater is started by its socket and a timer.

The updater has a unit of its own: it must not die with the agent that it replaces.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from instar.core.errors import MachineError
from instar.host.files import remove, write_atomic
from instar.host.interpreter import command
from instar.host.layout import LINES, Layout

FOLDER = Path("/etc/systemd/system")
RUNNING = Path("/run/systemd/system")  # there if and only if systemd is the service manager, sd_booted(3)
SYSTEMCTL_S = 60.0

AGENT = """\
[Unit]
Description=Instar agent
After=network.target
StartLimitIntervalSec=0

[Service]
ExecStart={agent}
Restart=always
RestartSec=200ms
TimeoutStopSec=5s
OOMPolicy=continue
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths={state}

[Install]
WantedBy=multi-user.target
"""

# The updater restarts the agent through systemctl, which needs the bus but no more privileges.
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
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths={state}
"""

SOCKET = """\
[Unit]
Description=Instar updater's local socket

[Socket]
ListenStream={state}/run/updater.sock
SocketMode=0600

[Install]
WantedBy=sockets.target
"""

TIMER = """\
[Unit]
Description=Instar updater looks by itself

[Timer]
OnBootSec=5s
OnUnitInactiveSec=300s
RandomizedDelaySec=30s

[Install]
WantedBy=timers.target
"""

UNITS = {
    "instar-agent.service": AGENT,
    "instar-updater.service": UPDATER,
    "instar-updater.socket": SOCKET,
    "instar-updater.timer": TIMER,
}
ENABLED = ("instar-updater.socket", "instar-updater.timer", "instar-agent.service")


def systemd_runs() -> bool:
    return RUNNING.is_dir()


def write_units(layout: Layout, folder: Path = FOLDER) -> None:
    """Write, load and enable the units; the socket is listened on when this returns."""
    words = {"state": str(layout.state)}
    for role in LINES:
        words[role] = " ".join(command(layout.launcher, "launch", role, "--state", str(layout.state)))
    for name, text in UNITS.items():
        write_atomic(folder / name, text.format(**words).encode())
    _systemctl("daemon-reload")
    _systemctl("enable", *ENABLED)
    _systemctl("start", "instar-updater.socket", "instar-updater.timer")


def remove_units(folder: Path = FOLDER) -> None:
    """Stop, disable and remove the units. Absent ones are fine."""
    present = [name for name in UNITS if (folder / name).exists()]
    if present:
        _systemctl("disable", "--now", *[name for name in ENABLED if name in present])
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
