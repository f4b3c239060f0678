"""Process 1 of the lab's system: mounts, network, the node's keeper; it tells on the serial line how it goes.

Runs on the guest's own Python, alone; nothing of this repository is imported. The variant's words say how it is
broken on purpose: `panics` ends process 1, `hangs` does nothing and feeds no watchdog, `no-agent` starts nothing.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# ruff: noqa: S108 - it is the guest that has a /tmp of its own
EFIVARS, ESP, DATA = "/sys/firmware/efi/efivars", "/efi", "/data"
STATE = f"{DATA}/instar"
PROGRAM = "/usr/lib/instar/instar.pyz"
SETTINGS = Path("/sys/firmware/qemu_fw_cfg/by_name/opt/instar")
WATCHDOG_S = 5.0
LIBRARY = ctypes.CDLL(None, use_errno=True)


def say(text: str) -> None:
    print(f"LAB {text}", flush=True)


def mount(what: str, where: str, kind: str, options: str = "") -> bool:
    status: int = LIBRARY.mount(what.encode(), where.encode(), kind.encode(), 0, options.encode())
    return status == 0


def setting(name: str) -> bytes:
    try:
        return (SETTINGS / name / "raw").read_bytes()
    except OSError:
        return b""


def run(*words: str) -> int:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"{' '.join(words)[:120]}: {done.returncode} {(done.stderr or done.stdout).strip()[-600:]!r}")
    return done.returncode


def prepare() -> None:
    for what, where, kind, options in (
        ("tmpfs", "/run", "tmpfs", "mode=0755"), ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
        ("efivarfs", EFIVARS, "efivarfs", ""),
        ("/dev/nvme0n1p1", ESP, "vfat", "umask=0077"), ("/dev/nvme0n1p4", DATA, "ext4", ""),
    ):  # fmt: skip
        if not mount(what, where, kind, options):
            say(f"cannot mount {where}")
    run("/usr/bin/busybox", "ip", "link", "set", "lo", "up")
    card = next((name for name in os.listdir("/sys/class/net") if name != "lo"), "")
    run("/usr/bin/busybox", "ip", "link", "set", card, "up")
    run("/usr/bin/busybox", "ip", "addr", "add", "10.0.2.15/24", "dev", card)
    run("/usr/bin/busybox", "ip", "route", "add", "default", "via", "10.0.2.2")


def node() -> None:
    """Install it at the first start; then start it."""
    interpreter = ["/usr/bin/python3", "-I", "-S"]
    if not os.path.exists(f"{STATE}/identity/node.json"):
        given = f"{DATA}/instar.pyz"
        run(
            *interpreter,
            given,
            "install",
            "--state",
            STATE,
            "--service",
            "none",
            "--no-start",
            "--wait",
            "60",
        )
        config = setting("config.toml")
        if config:
            Path(STATE, "config.toml").write_bytes(config)
    run(*interpreter, f"{STATE}/launcher/instar.pyz", "start", "--state", STATE)


def keep() -> None:
    """Reap, feed the watchdog, and pass on what the daemons log."""
    watchdog = os.open("/dev/watchdog", os.O_WRONLY) if os.path.exists("/dev/watchdog") else -1
    logs: dict[str, int] = {}
    while True:
        if watchdog >= 0:
            os.write(watchdog, b"1")
        end = time.monotonic() + WATCHDOG_S
        while time.monotonic() < end:
            for name in ("updater", "agent"):
                logs[name] = pass_on(name, logs.get(name, 0))
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                pass
            time.sleep(0.2)


def pass_on(name: str, start: int) -> int:
    try:
        with open(f"{STATE}/run/{name}.log", "rb") as file:
            file.seek(start)
            data = file.read()
    except OSError:
        return start
    for line in data.decode(errors="replace").splitlines():
        print(f"{name}: {line}", flush=True)
    return start + len(data)


def main() -> None:
    version, *broken = Path("/etc/lab-version").read_text().split()
    prepare()
    command = Path("/proc/cmdline").read_text()
    via = "kexec" if "instar.via=kexec" in command else "firmware"
    say(f"up version={version} via={via} uptime={Path('/proc/uptime').read_text().split()[0]}")
    if "panics" in broken:
        sys.exit(1)
    if "hangs" in broken:
        while True:
            time.sleep(60)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "no-agent" not in broken:
        node()
    say("ready")
    keep()


main()
