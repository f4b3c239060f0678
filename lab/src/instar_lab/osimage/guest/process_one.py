"""Process 1 of the lab's system: mounts, network, watchdog, the node; it tells on the serial line how it goes.

Runs on the guest's own Python, alone; nothing of this repository is imported. The variant's words say how it is
broken on purpose (instar_lab.osimage.variant, BROKEN).

SIGTERM and SIGUSR2, which the programs `reboot` and `poweroff` send, take the machine down in good order: the
node is stopped (bounded), then all others are, file systems are synced and unmounted.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

# ruff: noqa: S108 - it is the guest that has a /tmp of its own
EFIVARS, ESP, DATA = "/sys/firmware/efi/efivars", "/efi", "/data"
STATE = f"{DATA}/instar"
GIVEN = f"{DATA}/given"  # what the machine was delivered with: the program, its settings
SETTINGS = Path("/sys/firmware/qemu_fw_cfg/by_name/opt/instar")
ROLES = ("updater", "agent")
WATCHDOG = "/dev/watchdog"
FEED_S, ENROL_S, STOP_S, GRACE_S, GUARD_S = 5.0, 120, 40.0, 2.0, 20.0
INTERPRETER = ("/usr/bin/python3", "-I", "-S")
RESTART, POWER_OFF = 0x01234567, 0x4321FEDC  # reboot(2)
LIBRARY = ctypes.CDLL(None, use_errno=True)

wanted: list[int] = []  # the way down that was asked for


def say(text: str) -> None:
    print(f"LAB {text}", flush=True)


def mount(what: str, where: str, kind: str, options: str = "") -> None:
    if LIBRARY.mount(what.encode(), where.encode(), kind.encode(), 0, options.encode()) != 0:
        say(f"cannot mount {where}: {os.strerror(ctypes.get_errno())}")


def setting(name: str) -> bytes:
    try:
        return (SETTINGS / name / "raw").read_bytes()
    except OSError:
        return b""


def run(*words: str, within_s: float = 180.0) -> int:
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=within_s
        )
    except subprocess.TimeoutExpired:
        say(f"{' '.join(words)[:120]}: no end within {within_s:g} s")
        return 124
    if done.returncode:
        say(f"{' '.join(words)[:120]}: {done.returncode} {(done.stderr or done.stdout).strip()[-600:]!r}")
    return done.returncode


# --- coming up


def prepare() -> None:
    for what, where, kind, options in (
        ("tmpfs", "/run", "tmpfs", "mode=0755"), ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
        ("efivarfs", EFIVARS, "efivarfs", ""),
        ("/dev/nvme0n1p1", ESP, "vfat", "umask=0077"), ("/dev/nvme0n1p4", DATA, "ext4", ""),
    ):  # fmt: skip
        mount(what, where, kind, options)
    socket.sethostname("lab")


def network() -> None:
    run("ip", "link", "set", "lo", "up")
    card = next((name for name in os.listdir("/sys/class/net") if name != "lo"), "lo")
    run("ip", "link", "set", card, "up")
    run("ip", "addr", "add", "10.0.2.15/24", "dev", card)
    run("ip", "route", "add", "default", "via", "10.0.2.2")


def feed(watchdog: int) -> None:
    """For ever; in a thread of its own, for the rest may wait for a server."""
    while True:
        os.write(watchdog, b"1")
        time.sleep(FEED_S)


def node() -> None:
    """Install it at the first start; then start it."""
    if not os.path.exists(f"{STATE}/identity/node.json"):
        run(
            *INTERPRETER, f"{GIVEN}/instar.pyz", "install", "--state", STATE, "--service", "none", "--no-start",
            "--wait", str(ENROL_S),
        )  # fmt: skip
        with contextlib.suppress(FileNotFoundError):
            Path(STATE, "config.toml").write_bytes(Path(GIVEN, "config.toml").read_bytes())
    run(*INTERPRETER, f"{STATE}/launcher/instar.pyz", "start", "--state", STATE)


def guard() -> None:
    """Who ends a trial when the node's programs do not: started by the image, and not by them. Not at once, for
    nearly always there is nothing to do, and the node is to come up first."""
    time.sleep(GUARD_S)
    if os.path.exists(f"{STATE}/launcher/instar.pyz"):
        words = [*INTERPRETER, f"{STATE}/launcher/instar.pyz", "boot-guard", "--state", STATE]
        subprocess.Popen(words, stdin=subprocess.DEVNULL)


def alone() -> None:
    """Run the program that the machine was given in place of a node, and switch off."""
    Path("/run/program.py").write_bytes(setting("program"))
    done = subprocess.run([*INTERPRETER, "-u", "/run/program.py"], check=False)
    say(f"program ended with {done.returncode}")
    run("/usr/bin/busybox", "poweroff", "-f")


# --- being up


def keep(logs: dict[str, int]) -> int:
    """Reap, and pass on what the daemons log, until somebody wants the machine down; the way that is wanted.
    `logs` says up to where each log was written before."""
    while not wanted:
        for name, start in logs.items():
            logs[name] = pass_on(name, start)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.2)
    return wanted[0]


def log_of(role: str) -> str:
    return f"{STATE}/run/{role}.log"


def pass_on(name: str, start: int) -> int:
    try:
        with open(log_of(name), "rb") as file:
            start = start if os.fstat(file.fileno()).st_size >= start else 0
            file.seek(start)
            data = file.read()
    except OSError:
        return start
    whole = data[: data.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        print(f"{name}: {line}", flush=True)
    return start + len(whole)


# --- going down


def go_down(way: int) -> None:
    say("going down")
    if os.path.exists(f"{STATE}/launcher/instar.pyz"):
        run(*INTERPRETER, f"{STATE}/launcher/instar.pyz", "stop", "--state", STATE, within_s=STOP_S)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, number)  # everybody but process 1
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end and reaped():
            time.sleep(0.05)
    os.sync()
    for folder in (ESP, DATA, EFIVARS):
        run("umount", folder, within_s=30.0)
    say("down")
    LIBRARY.reboot(ctypes.c_int(way))


def reaped() -> bool:
    """Reap who has ended; whether anybody is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def main() -> None:
    version, *broken = Path("/etc/lab-version").read_text().split()
    signal.signal(signal.SIGTERM, lambda *_: wanted.append(RESTART))
    signal.signal(signal.SIGUSR2, lambda *_: wanted.append(POWER_OFF))
    watchdog = os.open(WATCHDOG, os.O_WRONLY | os.O_CLOEXEC) if os.path.exists(WATCHDOG) else -1
    prepare()
    command = Path("/proc/cmdline").read_text()
    via = "kexec" if "instar.via=kexec" in command else "firmware"
    say(f"up version={version} via={via} uptime={Path('/proc/uptime').read_text().split()[0]}")
    if "panics" in broken:
        sys.exit(1)
    if "hangs" in broken:
        while True:
            time.sleep(60)
    if watchdog >= 0:
        threading.Thread(target=feed, args=(watchdog,), daemon=True).start()
    if setting("program"):
        alone()
    if "no-network" not in broken:
        network()
    subprocess.Popen([*INTERPRETER, "/usr/lib/hands.py"], stdin=subprocess.DEVNULL)
    threading.Thread(target=guard, daemon=True).start()
    logs = {role: os.path.getsize(log_of(role)) if os.path.exists(log_of(role)) else 0 for role in ROLES}
    if "no-node" not in broken:
        node()
    say("ready")
    go_down(keep(logs))


main()
