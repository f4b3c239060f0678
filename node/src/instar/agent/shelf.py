"""The modules on this node's disk: found by digest, fetched by a child when they are not there.

A release is checked file by file against its manifest before it is handed out. Of a release that was
found good, only what the file system knows about its files (number, size, times) is compared the next
time; any write changes that, and then the files are read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from instar.core.errors import (
    InputError,
    InstarError,
    MachineError,
    ServerRefused,
    ServerUnreachable,
    TrustError,
)
from instar.host.layout import Layout

if TYPE_CHECKING:
    from instar.agent.children import Ended
    from instar.trust.module import ModuleManifest

USED_EVERY_S = 3600.0  # least time between two writes of `used`
GRACE_S = 5.0  # for the child to say that it was too late, before it is killed
ANSWER_MOST = 65_536  # bytes that the child may say
KILLED = "fetch-killed"  # the child was ended by a signal: what it had fetched is there for the next one
CLASS_OF_KIND: dict[str, type[InstarError]] = {
    "trust": TrustError,
    "unreachable": ServerUnreachable,
    "stale": ServerUnreachable,
    "refused": ServerRefused,
    "input": InputError,
}

log = logging.getLogger("instar.agent")
Stamp = tuple[tuple[int, int, int, int], ...]


class Module(NamedTuple):
    """A release of a module that was checked. `folder` is absolute."""

    manifest: ModuleManifest
    folder: Path
    digest: str
    release: str

    def request(self, seconds: float) -> dict[str, Any]:
        """What a runner's first line says of it; `seconds` for one run, 0: without end. Raises InputError
        `wrong-machine`."""
        manifest, limits, touches = self.manifest, self.manifest.limits, self.manifest.touches
        return {
            "module": {
                "name": manifest.name,
                "version": manifest.version,
                "digest": self.digest,
                "folder": str(self.folder),
                "runs": manifest.runs,
                "mode": manifest.mode,
                "entry": manifest.entry_for(os.uname().machine),
                "stateful": manifest.stateful,
            },
            "limits": {
                "seconds": seconds,
                **{name: getattr(limits, name) for name in type(limits).__slots__},
            },
            "touches": {"read": touches.read, "write": touches.write, "network": touches.network},
            "user": touches.user,
        }


class Shelf:
    """`fetch_command` is `instar.pyz fetch-module --state DIR [--proxy …]`; what to fetch is appended."""

    def __init__(self, layout: Layout, fetch_command: list[str]) -> None:
        self._layout, self._fetch_command = layout, fetch_command
        self._good: dict[Path, tuple[Stamp, Module]] = {}
        self._fetches: dict[str, asyncio.Task[None]] = {}

    def find(self, name: str, version: str, digest: str) -> Module | None:
        """The module with exactly this version and digest; None when it is not on the disk, or damaged.

        Raises InputError for what names no module or release.
        """
        from instar.core.modules import check_name
        from instar.core.releases import Release

        release = Release(version, digest).name
        module = self._load(check_name(name), release, quiet=True)
        return module if module is not None and module.digest == digest else None

    async def fetch(self, name: str, version: str, digest: str, target: str, within_s: float) -> Module:
        """Have it fetched: by one child for each digest, however many wait. Raises InstarError."""
        task = self._fetches.get(digest)
        if task is None:
            words = ["--name", name, "--version", version, "--digest", digest, "--target", target]
            words += ["--within", f"{within_s:.1f}"]
            task = asyncio.create_task(self._fetch([*self._fetch_command, *words], within_s))
            self._fetches[digest] = task
            task.add_done_callback(lambda done: self._fetched(digest, done))
        await asyncio.shield(task)
        module = self.find(name, version, digest)
        if module is None:
            text = f"cannot fetch module {name} {version}: the child said it did, but it is not on the disk"
            raise MachineError("not-fetched", text)
        return module

    def services(self) -> dict[str, Module]:
        """Modules with a `current` link, checked; a damaged one is logged and left out."""
        found: dict[str, Module] = {}
        try:
            names = sorted(os.listdir(self._layout.modules))
        except FileNotFoundError:
            return found
        for name in names:
            module = self._current(name)
            if module is not None:
                found[name] = module
        return found

    def mark_used(self, module: Module) -> None:
        """Note that it runs, at most once an hour: what is not used is collected one day.

        The module's `used` file says when any release of it ran, the time of a release's folder when that did.
        """
        now, used = time.time(), self._layout.module(module.manifest.name).used
        with contextlib.suppress(OSError):
            if abs(now - module.folder.stat().st_mtime) >= USED_EVERY_S or not used.exists():
                os.close(os.open(used, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
                os.utime(used)
                os.utime(module.folder)

    def _current(self, name: str) -> Module | None:
        from instar.core.modules import check_name
        from instar.host.line import Line

        try:
            release = Line(self._layout.module(check_name(name))).current()
        except InputError:
            return None
        module = self._load(name, release, quiet=False) if release else None
        if module is not None and module.manifest.mode != "service":
            log.error("module %s is not started: it is no service", name)
            return None
        return module

    def _load(self, name: str, release: str, quiet: bool) -> Module | None:
        from instar.host.line import MANIFEST, Line
        from instar.trust.module import ModuleManifest, module_digest

        line = Line(self._layout.module(name))
        folder = line.folder(release)
        if quiet and not folder.is_dir():
            return None
        stamp, known = _stamp(folder), self._good.get(folder)
        if known is not None and stamp and known[0] == stamp:
            return known[1]
        try:
            line.check(release)
            data = (folder / MANIFEST).read_bytes()
            manifest = ModuleManifest.decode(data)
            if manifest.name != name:
                raise InputError("bad-manifest", f"it is the manifest of {manifest.name}")
        except (InstarError, OSError) as error:
            log.error("module %s %s is damaged: %s", name, release, error)
            self._good.pop(folder, None)
            return None
        module = Module(manifest, folder.absolute(), module_digest(data), release)
        self._good = {path: value for path, value in self._good.items() if path.is_dir()}
        self._good[folder] = (stamp, module)
        return module

    async def _fetch(self, command: list[str], within_s: float) -> None:
        from instar.agent.children import run_child

        try:
            ended = await run_child(command, b"", within_s + GRACE_S, ANSWER_MOST)
        except OSError as error:
            raise MachineError("cannot-run", f"cannot fetch a module: {error.strerror or error}") from error
        fault = _fault(ended)
        if fault is not None:
            raise fault

    def _fetched(self, digest: str, task: asyncio.Task[None]) -> None:
        del self._fetches[digest]
        if not task.cancelled():
            task.exception()  # all who wait have it; nobody may wait any more


def _stamp(folder: Path) -> Stamp:
    """What changes with any write below `folder`; () when it cannot be told. The folder's own time says when
    it was last used."""
    try:
        stats = [path.lstat() for path in sorted(folder.rglob("*"))]
    except OSError:
        return ()
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)


def _fault(ended: Ended) -> InstarError | None:
    """What the child's end means; None: it did it."""
    if ended.cut == "deadline":
        return ServerUnreachable(
            "fetch-timeout", f"cannot fetch a module: no end within {ended.seconds:.0f} s"
        )
    try:
        answer = json.loads(ended.output)
        if answer["ok"] is True and ended.exit_code == 0 and not ended.signal:
            return None
        code, text = str(answer["error"]["code"])[:64], str(answer["error"]["text"])[:500]
        return CLASS_OF_KIND.get(str(answer.get("kind")), MachineError)(code, text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        words = ended.stderr.strip().rpartition("\n")[2][-300:]
        how = f"signal {ended.signal}" if ended.signal else f"exit {ended.exit_code}"
        code = KILLED if ended.signal else "fetch-failed"
        return MachineError(code, f"cannot fetch a module: {how}: {words!a}")
