"""One machine under QEMU with real firmware (OVMF), without hardware help: what it says on its serial line.

Always by software (`-accel tcg`): a /dev/kvm may be there and fail late. The disk and the variable store are
files that can be looked at when it is off.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from instar.core.errors import MachineError
from instar_lab.osimage.hands import Hands
from instar_lab.osimage.packages import FIRMWARE, SECURE_FIRMWARE

VARIABLES = FIRMWARE.with_name("OVMF_VARS_4M.fd")
MEMORY_MIB = 512
END_S = 10.0
HOST = "10.0.2.2"  # the host as the guest sees it, in QEMU's user network


class Vm:
    """A context manager. `folder` gets `serial.log` and `variables.fd`; `disk` is written to.

    `writes`: a file that gets a record of every write to the disk (blocklog.py reads it). `secure`: firmware that
    refuses what is not signed, once keys are in the variable store. The machine has a watchdog, which runs when
    the guest has started it, and a port through which the guest does what it is asked (`do`)."""

    def __init__(
        self,
        folder: Path,
        disk: Path,
        settings: Mapping[str, Path] | None = None,
        writes: Path | None = None,
        secure: bool = False,
    ) -> None:
        self.folder, self.disk, self.writes, self.secure = folder, disk, writes, secure
        self.variables, self.serial = folder / "variables.fd", folder / "serial.log"
        self._hands = Hands(folder / "hands")
        self._settings = settings or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: list[tuple[float, str]] = []
        self._news = threading.Condition()
        folder.mkdir(parents=True, exist_ok=True)
        if not self.variables.exists():
            shutil.copy(VARIABLES, self.variables)

    def __enter__(self) -> Vm:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut_power()

    def start(self) -> None:
        """Raises MachineError `no-vm`."""
        words = [
            "qemu-system-x86_64", "-accel", "tcg", "-cpu", "qemu64,+rdrand", "-m", str(MEMORY_MIB),
            "-display", "none", "-monitor", "none", "-serial", "stdio", "-nodefaults",
            *self._firmware(), *self._drive(), *self._hands.device(),
            "-device", "nvme,drive=disk,serial=1", "-device", "i6300esb", "-action", "watchdog=reset",
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci",
        ]  # fmt: skip
        for name, path in self._settings.items():
            words += ["-fw_cfg", f"name=opt/instar/{name},file={path}"]
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise MachineError("no-vm", f"cannot start QEMU: {error}") from None
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _firmware(self) -> list[str]:
        code, more = FIRMWARE, ["-machine", "q35"]
        if self.secure:
            code, more = SECURE_FIRMWARE, [
                "-machine", "q35,smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on",
                "-global", "ICH9-LPC.disable_s3=1",
            ]  # fmt: skip
        return [
            *more,
            "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}",
            "-drive", f"if=pflash,format=raw,unit=1,file={self.variables}",
        ]  # fmt: skip

    def _drive(self) -> list[str]:
        if self.writes is None:
            return ["-drive", f"if=none,id=disk,format=raw,cache=writeback,file={self.disk}"]
        self.writes.write_bytes(b"")
        below = f"driver=raw,node-name=base,file.driver=file,file.filename={self.disk}"
        above = f"driver=blklogwrites,node-name=disk,file=base,log.driver=file,log.filename={self.writes}"
        return ["-blockdev", below, "-blockdev", f"{above},log-sector-size=512"]

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with self.serial.open("ab") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                text = line.decode(errors="replace").rstrip()
                with self._news:
                    self._lines.append((time.monotonic(), text))
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def do(self, script: str, within_s: float = 60.0) -> str:
        """Have the guest run a shell script; what that said. Only while process 1 is at work there ("LAB ready").

        Raises MachineError `guest-failed` when it ends with another status than 0, `not-seen` without an answer.
        """
        return self._hands.do(script, within_s)

    # --- looking

    @property
    def mark(self) -> int:
        """Where the serial line stands now, for `wait_for`."""
        return len(self._lines)

    def lines(self, since: int = 0) -> list[str]:
        return [text for _, text in self._lines[since:]]

    def wait_for(self, words: str, within_s: float, since: int = 0) -> str:
        """The first line from `since` on that holds `words`. Raises MachineError `not-seen` with the last lines."""
        end = time.monotonic() + within_s
        at = since
        with self._news:
            while True:
                for number in range(at, len(self._lines)):
                    if words in self._lines[number][1]:
                        return self._lines[number][1]
                at = len(self._lines)
                left = end - time.monotonic()
                running = self._process is not None and self._process.poll() is None
                if left <= 0 or not (running or self._news.wait(0.2)):
                    tail = "\n".join(self.lines()[-40:])
                    raise MachineError(
                        "not-seen", f"cannot go on: no {words!r} within {within_s:g} s:\n{tail}"
                    )
                self._news.wait(min(left, 1.0))

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    # --- ending

    def wait_end(self, within_s: float) -> None:
        """Until it has switched itself off. Raises MachineError `not-seen`."""
        if self._process is not None:
            try:
                self._process.wait(within_s)
            except subprocess.TimeoutExpired:
                text = f"cannot go on: the machine is not off within {within_s:g} s"
                raise MachineError("not-seen", text) from None

    def cut_power(self) -> None:
        """End it at once. Idempotent."""
        self._hands.close()
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait(END_S)
