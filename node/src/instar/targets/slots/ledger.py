"""What is known of both slots, written down as it changes: their records, and the manifests of what they hold.

    <state>/os/slots.json    records.py
    <state>/os/a.manifest    the signed manifest of slot A's bundle, as it came; its digest is in the record

With a manifest, a slot can be checked byte by byte without anybody's help, years later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, MachineError
from instar.core.releases import version_key
from instar.host.boot.slots import other
from instar.host.files import Disk, make_folder, write_atomic
from instar.targets.slots.platform import Platform
from instar.targets.slots.records import SlotRecord, read_records, write_records
from instar.trust.bundle import Bundle, bundle_digest, decode

READ = 1 << 20


class Ledger:
    """Caches nothing. `wall` is the wall clock, unix seconds, for people."""

    def __init__(self, folder: Path, platform: Platform, wall: Callable[[], float], disk: Disk) -> None:
        self._folder, self._platform, self._wall, self._disk = folder, platform, wall, disk
        self.path = folder / "slots.json"

    # --- looking

    def records(self) -> dict[str, SlotRecord]:
        return read_records(self.path)

    def record(self, slot: str) -> SlotRecord:
        return self.records()[slot]

    def running(self) -> str:
        """Raises MachineError `unknown-slot`: unsure means that nothing is written."""
        running = self._platform.running()
        if not running:
            text = "cannot tell which slot runs: the mounted root lies on neither of the two"
            raise MachineError("unknown-slot", text)
        return running

    def idle(self) -> str:
        """The slot that may be written. Raises MachineError `unknown-slot`."""
        return other(self.running())

    def usable(self, slot: str) -> bool:
        """Whether the slot can be gone back to, as far as its record and its kernel image's presence say."""
        return self.record(slot).usable and self._platform.boot.kernel(slot).is_file()

    def manifest(self, slot: str) -> Bundle | None:
        """Of what the slot holds; None where it is not kept, or not that of the record."""
        try:
            data = (self._folder / f"{slot}.manifest").read_bytes()
            return decode(data) if bundle_digest(data) == self.record(slot).digest else None
        except (OSError, InputError):
            return None

    # --- writing

    def mark(self, slot: str, **changes: Any) -> None:
        """Change some fields of a slot's record. `since` goes with the state."""
        record = self.record(slot)
        new = record._replace(**changes)
        if new.state != record.state:
            new = new._replace(since=self._wall())
        if new != record:
            self._put(slot, new)

    def begin(self, slot: str, version: str, bundle: Bundle) -> None:
        """From now on `slot` is being written. The manifest goes first: alone it says nothing."""
        data = bundle.encode()
        make_folder(self._folder, 0o700, self._disk)
        write_atomic(self._folder / f"{slot}.manifest", data, 0o600, self._disk)
        size = bundle.image("root").size
        self._put(slot, SlotRecord(version, bundle_digest(data), "writing", size, 0, self._wall()))

    def _put(self, slot: str, record: SlotRecord) -> None:
        write_records(self.path, {**self.records(), slot: record}, self._disk)

    # --- what nobody has installed

    def adopt(self) -> None:
        """Note what runs where nobody has written about it: the node's first system. It stays `unknown`; its digest
        is that of its kernel image, which names its root, so that it can be known again."""
        running = self._platform.running()
        if not running or self.record(running).state != "unknown":
            return
        version, digest = _version(self._platform.os_release), self.kernel_digest(running)
        self.mark(running, version=version, digest=digest if version else "")

    def kernel_digest(self, slot: str) -> str:
        """SHA-384 of a slot's kernel image; '' where it cannot be read."""
        hashed = hashlib.sha384()
        try:
            with self._platform.boot.kernel(slot).open("rb", buffering=0) as file:
                while data := file.read(READ):
                    hashed.update(data)
        except OSError:
            return ""
        return hashed.hexdigest()

    def is_as_adopted(self, slot: str) -> bool:
        return self.record(slot).digest == self.kernel_digest(slot) != ""


def _version(path: Path) -> str:
    """IMAGE_VERSION of an os-release file, else VERSION_ID, as a version of ours: `12` is 12.0.0. '' for none."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    said = dict(line.split("=", 1) for line in lines if "=" in line)
    for name in ("IMAGE_VERSION", "VERSION_ID"):
        text = said.get(name, "").strip().strip("\"'")
        parts = text.split(".")
        if all(part.isascii() and part.isdigit() for part in parts) and len(parts) < 3:
            text = ".".join(str(int(part)) for part in [*parts, "0", "0"][:3])
        try:
            version_key(text)
        except InputError:
            continue
        return text
    return ""
