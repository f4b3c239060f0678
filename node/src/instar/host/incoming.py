"""Parcels that come from outside: in blocks through the control channel, or whole through the updater's API.

    <state>/incoming/
      <id>.part        the first bytes of a parcel that is coming; <id> is its SHA-384, the first 24 digits
      <id>.offer.json  what it was offered as, and how much of it is on the disk for certain
      <id>.channel.new/ <id>.push.new/   being unpacked
      <id>/            parcel.json metadata/ archive, and `complete`, written last: the SHA-384 of the whole;
                       `needed` while an open transaction works with it

Knows no network and waits for nothing but the disk: the agent calls it from a thread, the launcher's beacon
as it is. Only the holder of the agent's role writes `.part`, only that of the updater's role pushes.

Import diet: bare standard library, `core`, `wire`, `host`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, InstarError, MachineError, TrustError
from instar.core.releases import Release
from instar.host.blocks import RECOVERY, Receiving, Terms, agree, bad_offer, decode_block
from instar.host.clock import Clock
from instar.host.disks import check_space
from instar.host.files import DISK, Disk, failed, make_folder, remove, remove_tree, write_atomic
from instar.host.layout import LINES
from instar.host.parcel import LIMITS, RECORD, Limits, Parcel, Stream, read_record, unpack_parcel
from instar.host.points import reach
from instar.wire.messages import UpdateOffer

__all__ = ["Incoming", "Parcel", "Receiving", "Terms", "agree", "decode_block"]

COMPLETE, NEEDED = "complete", "needed"
ID_DIGITS = 24
MOST_KEPT = 2  # parcels, whole or in part
DAY_S = 86_400.0
UNDER_WAY_S = 3_600.0  # what another writer has written to within this time is not left over

SHA384 = re.compile(r"[0-9a-f]{96}", re.ASCII)
OWN = re.compile(r"([0-9a-f]{24})(?:\.part|\.offer\.json|\.(?:channel|push)\.new)?", re.ASCII)


class Incoming:
    """All parcels of a node. The disk is the truth: nothing is remembered here."""

    def __init__(
        self, folder: Path, disk: Disk = DISK, clock: Clock | None = None, limits: Limits = LIMITS
    ) -> None:
        self.folder, self.disk, self.limits = folder, disk, limits
        self.clock = clock or Clock()

    # --- what comes in blocks

    def open(self, offer: UpdateOffer, block: int = 0) -> Receiving:
        """Ready to take blocks of `block` bytes (0: as offered), going on where an earlier try stopped.

        Nothing is changed before the first block comes, except that remains of no use are removed.
        Raises InputError `bad-offer`, or MachineError (`no-space`, `disk-failed`).
        """
        self.check(offer)
        try:
            make_folder(self.folder, 0o700, self.disk)
            whole = self.of_sha384(offer.sha384)
            have = 0 if whole else self._have(offer)
            if whole is None:  # the part grows to the whole, and is unpacked beside it
                check_space(self.folder, 2 * offer.length - have)
        except OSError as error:
            raise failed("use", self.folder, error) from error
        return Receiving(self, offer, block or offer.block, have, whole)

    def check(self, offer: UpdateOffer) -> None:
        """Raises InputError `bad-offer`: it is of no use whatever bytes follow."""
        if offer.line not in (*LINES, RECOVERY):
            raise bad_offer(f"a line of {', '.join((*LINES, RECOVERY))}", ascii(offer.line)[:40])
        if not SHA384.fullmatch(offer.sha384):
            raise bad_offer("sha384 as 96 hexadecimal digits", ascii(offer.sha384)[:100])
        if not 0 < offer.length <= self.limits.whole:
            raise bad_offer(f"a length of 1 to {self.limits.whole} bytes", f"{offer.length}")
        try:
            Release(offer.version, offer.digest)
        except InputError as error:
            raise InputError("bad-offer", error.text) from None

    def _have(self, offer: UpdateOffer) -> int:
        """Bytes of the part that are good as far as can be known. What is of no use is removed.

        Within one boot all that was written is there; after a power cut only what was synced.
        """
        part, record = self.part(offer.sha384), self._offer(offer.sha384)
        try:
            body = json.loads(record.read_bytes())
            known = (body["sha384"], body["length"]) == (offer.sha384, offer.length)
            same_boot, synced = body["boot_id"] == self.clock.boot_id(), int(body["synced"])
            status = os.lstat(part)
            size = status.st_size if same_boot else min(status.st_size, synced)
            if known and stat.S_ISREG(status.st_mode) and 0 <= status.st_size <= offer.length:
                return max(0, size)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        self.drop_part(offer.sha384)
        return 0

    # --- what comes whole

    def store(self, stream: Stream, sha384: str, by: str = "push") -> Parcel:
        """Unpack `stream` as it comes, in constant memory; whole only when its SHA-384 is `sha384`.

        Raises what unpack_parcel does, and TrustError `altered-parcel`; then nothing is left.
        Idempotent: the same parcel takes the place of one that is there. `by` names who unpacks, one at a
        time: what it left behind when it was killed is removed first.
        """
        if not SHA384.fullmatch(sha384):
            text = f"cannot take the parcel: expected SHA-384 as 96 hexadecimal digits, got {sha384[:100]!a}"
            raise InputError("bad-digest", text)
        make_folder(self.folder, 0o700, self.disk)
        for path in self.folder.glob(f"*.{by}.new"):
            remove_tree(path, self.disk)
        self.make_room(sha384, by)
        hashing = _Hashing(stream)
        new = self.folder / f"{sha384[:ID_DIGITS]}.{by}.new"
        parcel = unpack_parcel(hashing, new, self.limits, self.disk)
        reach("incoming:unpacked")
        try:
            got = hashing.digest.hexdigest()
            if got != sha384:
                text = f"cannot use the parcel: expected SHA-384 {sha384[:24]}…, got {got[:24]}…"
                raise TrustError("altered-parcel", text)
            return self._complete(parcel, sha384)
        except BaseException:
            with contextlib.suppress(MachineError, OSError):
                remove_tree(new, self.disk)
            raise

    def _complete(self, parcel: Parcel, sha384: str) -> Parcel:
        """Mark it, and give it its place. The marker is written last; the rename makes it all be there."""
        place = self.folder / sha384[:ID_DIGITS]
        try:
            self.disk.write_new(parcel.folder / COMPLETE, sha384.encode(), 0o600)
            self.disk.sync_folder(parcel.folder)
            reach("incoming:marked")
            if (there := self.of_sha384(sha384)) is not None:  # it may be in use: the same bytes anyway
                remove_tree(parcel.folder, self.disk)
                return there
            self._remove(place)
            self.disk.rename(parcel.folder, place)
            self.disk.sync_folder(self.folder)
        except OSError as error:
            raise failed("keep", place, error) from error
        reach("incoming:complete")
        return parcel._replace(folder=place)

    # --- what is there

    def complete(self) -> list[Parcel]:
        """The whole ones, the newest first."""
        found = [(self._age(self.folder / name), self._read(name)) for name in self._ids()]
        return [parcel for _, parcel in sorted(found, key=lambda pair: -pair[0]) if parcel is not None]

    def find(self, line: str, digest: str) -> Parcel | None:
        """The newest whole one that holds the node program `digest`, for the line `agent` or `updater`."""
        if line not in LINES:
            return None
        return next((p for p in self.complete() if (p.kind, p.digest) == ("node", digest)), None)

    def of_sha384(self, sha384: str) -> Parcel | None:
        """The whole one that has this SHA-384."""
        parcel = self._read(sha384[:ID_DIGITS])
        return parcel if parcel is not None and self._marker(parcel.folder) == sha384 else None

    # --- what goes

    def need(self, parcel: Parcel) -> None:
        """An open transaction works with it: no other takes its place. Idempotent. Raises MachineError."""
        if not (parcel.folder / NEEDED).exists():
            write_atomic(parcel.folder / NEEDED, b"", 0o600, self.disk)

    def release(self, parcel: Parcel) -> None:
        """It may go. Idempotent."""
        remove(parcel.folder / NEEDED, self.disk)

    def remove(self, parcel: Parcel) -> None:
        """Its marker first: half of it is never whole. Idempotent."""
        self._poison(parcel.folder)

    def sweep(self, keep: set[str], now_wall: float) -> None:
        """Remove what is older than a day, and parcels without their archive; never one whose program
        digest is in `keep`. `now_wall` is unix time. What is not ours is left alone."""
        for name, path in self._entries():
            parcel = self._read(name) if path.name == name else None
            if parcel is not None and parcel.digest in keep:
                continue
            used_up = path.name == name and parcel is None
            if (used_up and self._marker_release(path) not in keep) or now_wall - self._age(path) > DAY_S:
                self._remove(path)

    # --- inside

    def _read(self, name: str) -> Parcel | None:
        folder = self.folder / name
        try:
            if not self._marker(folder).startswith(name):
                return None
            parcel = read_record((folder / RECORD).read_bytes(), folder, self.limits)
            status = os.lstat(parcel.archive)
        except (OSError, InstarError):
            return None
        return parcel if stat.S_ISREG(status.st_mode) and status.st_size == parcel.length else None

    def _marker(self, folder: Path) -> str:
        """The SHA-384 that the marker says; '' without one."""
        try:
            text = (folder / COMPLETE).read_text("ascii")
        except (OSError, UnicodeDecodeError):
            return ""
        return text if SHA384.fullmatch(text) else ""

    def _marker_release(self, folder: Path) -> str:
        """The program digest of a parcel whose archive is gone."""
        try:
            return read_record((folder / RECORD).read_bytes(), folder, self.limits).digest
        except (OSError, InstarError):
            return ""

    def _entries(self) -> list[tuple[str, Path]]:
        """(id, path) of everything of ours."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return []
        return [(match[1], self.folder / name) for name in sorted(names) if (match := OWN.fullmatch(name))]

    def _ids(self) -> list[str]:
        return [name for name, path in self._entries() if path.name == name]

    def _age(self, path: Path) -> float:
        """When it was last written to, unix time; 0 when it is gone."""
        try:
            return os.lstat(path).st_mtime
        except OSError:
            return 0.0

    def make_room(self, sha384: str, by: str) -> None:
        """Remove the oldest others, so that no more than MOST_KEPT are kept with this one, which `by` brings.

        What another writer is about to bring is left alone, and not counted: it makes room itself. Raises
        MachineError `no-space` when open transactions need all that is there; then nothing is removed.
        """
        newest: dict[str, float] = {}
        coming: set[str] = set()
        for name, path in self._entries():
            newest[name] = max(newest.get(name, 0.0), self._age(path))
            if self._is_anothers(path, by):
                coming.add(name)
        names = [name for name in newest if name != sha384[:ID_DIGITS]]
        needed = {name for name in names if (self.folder / name / NEEDED).exists() and self._read(name)}
        if len(needed) >= MOST_KEPT:
            text = f"expected at most {MOST_KEPT - 1} that open transactions need, got {len(needed)}"
            raise MachineError("no-space", f"cannot keep another parcel: {text}")
        free = [name for name in names if name not in needed | coming]
        by_age = sorted(free, key=lambda name: newest[name], reverse=True)
        for name in by_age[MOST_KEPT - 1 - len(needed) :]:
            for each, path in self._entries():
                if each == name:
                    self._remove(path)

    def _is_anothers(self, path: Path, by: str) -> bool:
        """Whether somebody else than `by` writes it at this time."""
        writer = "push" if path.name.endswith(".push.new") else "channel"
        if path.suffix not in (".part", ".new") or writer == by:
            return False
        touched = max(self._age(path), self._age(path / "archive"))
        return self.clock.wall() - touched < UNDER_WAY_S

    def drop_part(self, sha384: str) -> None:
        """Remove the part and its record."""
        for path in (self.part(sha384), self._offer(sha384)):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            self._poison(path)
        else:
            remove(path, self.disk)

    def _poison(self, folder: Path) -> None:
        with contextlib.suppress(MachineError):
            remove(folder / COMPLETE, self.disk) if folder.is_dir() else None
        remove_tree(folder, self.disk)

    def part(self, sha384: str) -> Path:
        return self.folder / f"{sha384[:ID_DIGITS]}.part"

    def _offer(self, sha384: str) -> Path:
        return self.folder / f"{sha384[:ID_DIGITS]}.offer.json"

    def note(self, offer: UpdateOffer, synced: int) -> None:
        """Write down what a part is, and how much of it a power cut leaves."""
        body: dict[str, Any] = {
            "v": 1,
            "sha384": offer.sha384,
            "length": offer.length,
            "line": offer.line,
            "version": offer.version,
            "digest": offer.digest,
            "boot_id": self.clock.boot_id(),
            "synced": synced,
        }
        write_atomic(self._offer(offer.sha384), json.dumps(body).encode(), 0o600, self.disk)


class _Hashing:
    """Hashes what is read through it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.digest = hashlib.sha384()

    def read(self, most: int, /) -> bytes:
        chunk = self._stream.read(most)
        self.digest.update(chunk)
        return chunk
