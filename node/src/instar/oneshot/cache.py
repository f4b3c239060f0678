"""The node's trusted TUF metadata on disk.

    <state>/trust/
      pinned-root.json          what `instar install` was given; everything starts from it
      tuf/root_history/N.root.json  timestamp.json  snapshot.json  targets.json
      scratch/                  only while a verification runs
      lock

python-tuf writes its cache without fsync. So it works on a copy in `scratch`, and what it accepted
(it writes nothing that it did not verify) is then written durably: roots first, then timestamp,
snapshot, targets. A kill in between leaves a mixture that tuf itself leaves too, and can go on from.
A file that cannot be read any more is left out of the copy and fetched again: losing the disk's
word about the past is better than never updating again; the loss is told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from instar.core.errors import TrustError
from instar.host.files import make_folder, remove_tree, write_atomic
from instar.host.locks import RoleLock

ONLINE = ("timestamp.json", "snapshot.json", "targets.json")
ROOTS = "root_history"
DURABLE = "tuf"
LOCK_S = 30.0  # a verification takes a second or two


class MetadataCache:
    """Use as a context manager: it holds the lock, and makes and removes the scratch copy."""

    def __init__(self, trust: Path) -> None:
        self._trust = trust
        self._durable = trust / DURABLE
        self.scratch = trust / "scratch"
        self.dropped: list[str] = []
        self._lock = RoleLock(trust / "lock")

    def __enter__(self) -> MetadataCache:
        make_folder(self._durable / ROOTS)
        self._lock.acquire(LOCK_S)
        remove_tree(self.scratch)
        make_folder(self.scratch / ROOTS)
        make_folder(self.scratch / "none")
        for path in self._names(self._durable):
            data = path.read_bytes()
            if version_of(data) is None:
                self.dropped.append(path.name)
            else:
                (self.scratch / path.relative_to(self._durable)).write_bytes(data)
        return self

    def __exit__(self, *exception: object) -> None:
        remove_tree(self.scratch)
        self._lock.release()

    def pinned_root(self) -> bytes:
        """The root that this node was installed with. Raises TrustError `no-pinned-root`."""
        path = self._trust / "pinned-root.json"
        try:
            return path.read_bytes()
        except OSError as error:
            raise TrustError("no-pinned-root", f"cannot verify anything: {path}: {error.strerror}") from error

    def keep(self) -> None:
        """Write what tuf accepted to its durable place. Raises MachineError `disk-full`, `disk-failed`."""
        for path in self._names(self.scratch):
            final = self._durable / path.relative_to(self.scratch)
            data = path.read_bytes()
            if not final.is_file() or final.read_bytes() != data:
                write_atomic(final, data)

    def local(self, role: str) -> bytes | None:
        """The metadata of `role` that is trusted now."""
        try:
            return (self.scratch / f"{role}.json").read_bytes()
        except OSError:
            return None

    @staticmethod
    def _names(folder: Path) -> list[Path]:
        roots = sorted(
            (folder / ROOTS).glob("[0-9]*.root.json"), key=lambda path: int(path.name.split(".")[0])
        )
        return [*roots, *(folder / name for name in ONLINE if (folder / name).is_file())]


def document(data: bytes | None) -> dict[str, Any]:
    """The `signed` part of metadata bytes, or {} for what cannot be read. Nothing is verified."""
    try:
        signed = json.loads(data or b"")["signed"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return signed if isinstance(signed, dict) else {}


def version_of(data: bytes | None) -> int | None:
    version = document(data).get("version")
    return version if isinstance(version, int) else None
