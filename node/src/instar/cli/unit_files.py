"""The text of a node's systemd units, and why each line of their sandboxes is there or is not.

The same texts serve `instar install`, which fills them in for one node, and the Debian package, which has
them for /var/lib/instar. In all of them a unit whose node is not enrolled does nothing.

Both daemons run as root. The agent's modules look after the machine, some as users of their own. The updater
writes the programs that root will run, so whoever could play it would be root: another user would hide that,
not change it. What bounds them is what stands below.

Not for any of them:
- ProtectKernelTunables and ProtectControlGroups: inside systemd-nspawn (systemd 252) a unit that has one of
  them reads the boot id of the host, not of the container. `instar status` and `instar install`, which run
  outside the unit, would then take its daemons for those of another boot.
- ProtectProc and ProcSubset: they would hide the processes that each must find and prove gone, and the boot id.
- MemoryDenyWriteExecute: with an older libffi it breaks ctypes, which rehearsals and modules use.
- PrivateUsers, and an IP address list: what either talks to, and whom modules belong to, is not known here.
- UMask: releases and modules are read by users that modules run as.
"""

from __future__ import annotations

# What all three end with: no daemon of ours needs what is forbidden here.
COMMON = """\
NoNewPrivileges=yes
PrivateTmp={private_tmp}
ProtectSystem=strict
ReadWritePaths={writable}
ProtectHome=read-only
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""

# Devices stay visible, since modules take stock of the hardware; ProtectClock would hide them. Its own part of
# the cgroup tree is for the limits of modules and jobs. A stop is told to the agent alone, which ends its modules
# in order; what is left of them when it is gone is killed. A recovery core leaves this unit through
# `systemd-run`: for that the sockets of D-Bus and systemd are in reach, as everything in /run is.
AGENT = (
    """\
[Unit]
Description=Instar agent
After=network.target
RequiresMountsFor={writable}
ConditionPathExists={enrolled}
StartLimitIntervalSec=0

[Service]
ExecStart={agent}
Restart=always
RestartSec=200ms
TimeoutStopSec=10s
KillMode=mixed
Delegate=yes
OOMPolicy=continue
# State and config.toml that an operator gave to another user; files that modules look at:
CapabilityBoundingSet=CAP_DAC_OVERRIDE
# A module's data is made its user's; a module runs as a user of its own, and is ended:
CapabilityBoundingSet=CAP_CHOWN CAP_FOWNER CAP_SETUID CAP_SETGID CAP_KILL
# Modules tell which process holds a port, also of one that may do more than they:
CapabilityBoundingSet=CAP_SYS_PTRACE
# Modules that look after the network:
CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BIND_SERVICE
# What a module of yours needs beside these comes from a drop-in: systemctl edit instar-agent.service
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_PACKET
SystemCallFilter=~@clock @cpu-emulation @module @mount @obsolete @raw-io @reboot @swap
"""
    + COMMON
)

# It starts at each boot, without waiting for its timer: a trial that a reboot cut short goes on. It fetches,
# writes below the state folder, and restarts the agent through systemctl: that needs systemd's socket and the
# same user, but no capability; nor does a signal to a process of the same user.
UPDATER = (
    """\
[Unit]
Description=Instar updater
After=network.target
RequiresMountsFor={writable}
ConditionPathExists={enrolled}
StartLimitIntervalSec=0

[Service]
ExecStart={updater}
Restart=on-failure
RestartSec=200ms
TimeoutStopSec=10s
# State and config.toml that an operator gave to another user; nothing else needs a capability:
CapabilityBoundingSet=CAP_DAC_OVERRIDE
PrivateDevices=yes
ProtectClock=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallFilter=@system-service
"""
    + COMMON
)

# A socket that has reached its trigger limit stays dead until somebody comes; the updater would be woken by
# its timer only.
SOCKET = """\
[Unit]
Description=Instar updater's local socket
RequiresMountsFor={writable}
ConditionPathExists={enrolled}

[Socket]
ListenStream={socket}
SocketMode=0600
TriggerLimitIntervalSec=0

[Install]
WantedBy=sockets.target
"""

# Apart from the local socket: a port that another program has must not take that one along.
API = """\
[Unit]
Description=Instar updater's API for operators
ConditionPathExists={enrolled}

[Socket]
Service=instar-updater.service
ListenStream={api}
FreeBind=yes
NoDelay=yes
TriggerLimitIntervalSec=0

[Install]
WantedBy=sockets.target
"""

# What a node whose `updater.api` is another address has beside the packaged unit.
API_DROP_IN = """\
# Made by `instar install` and `instar start` from updater.api of config.toml; `instar uninstall` removes it.
[Socket]
ListenStream=
ListenStream={api}
"""

# What the updater of a node with slots may do beside that. Its sandbox hides disks, and lets nothing but the state
# folder be written. An EFI system partition that is not mounted must not keep the updater from starting.
OS_DROP_IN = """\
# Made by `instar start` from [os] of config.toml; `instar uninstall` removes it.
[Unit]
After=local-fs.target

[Service]
# The slots, and the EFI system partition with their kernels:
PrivateDevices=no
ReadWritePaths=-{esp}
# Boot entries are immutable files of efivarfs:
CapabilityBoundingSet=CAP_LINUX_IMMUTABLE
# Where a file lies on the EFI system partition, so that no name is removed that shares its clusters (FIBMAP):
CapabilityBoundingSet=CAP_SYS_RAWIO
# kexec; a reboot is systemd's to do:
CapabilityBoundingSet=CAP_SYS_BOOT
SystemCallFilter=kexec_file_load
"""

TIMER = """\
[Unit]
Description=Instar updater looks by itself
ConditionPathExists={enrolled}

[Timer]
OnBootSec=30s
OnUnitInactiveSec=300s
RandomizedDelaySec=30s
AccuracySec=1s

[Install]
WantedBy=timers.target
"""

# For a system on trial in which the other units are not there, or do not do. It starts at each boot by itself, and
# ends at once where no slot is on trial. It looks at what is mounted, and restarts the machine: through systemd, and
# by the kernel's own call when that does nothing. A guard that was killed looks again.
GUARD = (
    """\
[Unit]
Description=Instar guard of a system on trial
RequiresMountsFor={writable}
ConditionPathExists={slots}
StartLimitIntervalSec=0

[Service]
ExecStart={guard}
Restart=on-failure
RestartSec=30s
# State and config.toml that an operator gave to another user; the restart that systemd has not done:
CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_SYS_BOOT
ProtectClock=yes
RestrictAddressFamilies=AF_UNIX
SystemCallFilter=@system-service reboot
"""
    + COMMON
)

UNITS = {
    "instar-agent.service": AGENT,
    "instar-updater.service": UPDATER,
    "instar-updater.socket": SOCKET,
    "instar-updater-api.socket": API,
    "instar-updater.timer": TIMER,
    "instar-boot-guard.service": GUARD,
}
