"""RAUC in a place of its own: a bus, its service, and installations, asked by words on stdin.

    python -m bench.peers.rauc_inside FOLDER SLOT BUNDLE…

FOLDER holds `cert.pem`. A word is the name of a bundle's file, without its ending: it is installed. The answer is
{"seconds","peak"}: from the start of `rauc install` to its end, and the most memory that its service ever held, in
bytes. Nothing of this machine's boot is touched: RAUC's bootloader
is its `noop`, the bus is our own, its mounts are in our own namespace.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from instar_lab import machine

READY_S, INSTALL_S = 20.0, 120.0
BUS = """<busconfig><listen>unix:path={bus}</listen><auth>EXTERNAL</auth><policy context="default">
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/><allow user="*"/>
</policy></busconfig>
"""
SYSTEM = """[system]
compatible=bench
bootloader=noop
mountprefix={folder}/mounts
statusfile={folder}/status
bundle-formats=plain
[keyring]
path={folder}/cert.pem
[slot.rootfs.0]
device={folder}/running
type=raw
bootname=A
[slot.rootfs.1]
device={slot}
type=raw
bootname=B
"""


class Rauc:
    def __init__(self, folder: Path, slot: Path) -> None:
        bus = folder / "bus"
        (folder / "mounts").mkdir()
        (folder / "running").touch()
        (folder / "bus.conf").write_text(BUS.format(bus=bus))
        (folder / "system.conf").write_text(SYSTEM.format(folder=folder, slot=slot))
        self._environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={bus}"}
        self._start("dbus-daemon", f"--config-file={folder / 'bus.conf'}", "--nofork", "--nopidfile")
        machine.wait_for(bus.exists, "the bus", READY_S)
        words = ("rauc", "-c", str(folder / "system.conf"), "service", "--override-boot-slot=A")
        self._service = self._start(*words)
        machine.wait_for(self._is_there, "RAUC's service", READY_S)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            words, env=self._environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr
        )

    def _is_there(self) -> bool:
        if self._service.poll() is not None:
            raise SystemExit("expected RAUC's service to run, it has ended")
        return self._run("status", within_s=READY_S).returncode == 0

    def _run(self, *words: str, within_s: float) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["rauc", *words], env=self._environment, timeout=within_s, check=False,
            stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr,
        )  # fmt: skip

    def install(self, bundle: Path) -> dict[str, float]:
        began = time.monotonic()
        done = self._run("install", str(bundle), within_s=INSTALL_S)
        seconds = time.monotonic() - began
        if done.returncode != 0:
            raise SystemExit(f"expected RAUC to install, it ended with {done.returncode}")
        return {"seconds": seconds, "peak": peak(self._service.pid)}


def peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def main(folder: Path, slot: Path, *bundles: Path) -> None:
    rauc, named = Rauc(folder, slot), {bundle.stem: bundle for bundle in bundles}
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(rauc.install(named[line.strip()])), flush=True)


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
