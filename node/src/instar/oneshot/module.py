"""`fetch-module`: bring one release of a module onto this node, for a job that asked for it.

    out  {"ok": true, "release": "1.0.0-0123456789ab"}
         {"ok": false, "error": {"code", "text"}, "kind": as `verify` says}

The signed metadata is verified, the archive fetched (resumed after a kill, capped in rate), each file
checked, and the release marked valid. One that is there already is not asked for again, so a module runs
on while metadata is expired or the server away. Safe against two at once, and against the updater.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from instar.core.errors import InputError, InstarError, MachineError, TrustError
from instar.core.modules import check_name
from instar.core.releases import Release
from instar.core.settings import Settings
from instar.engine.fetch import Limits, fetch
from instar.host.disks import check_flags, check_space
from instar.host.files import DISK, failed, make_folder, remove
from instar.host.layout import Layout, ModuleLayout
from instar.host.line import MANIFEST, Line
from instar.host.locks import RoleLock
from instar.host.points import reach
from instar.host.records import read_artifacts, read_config
from instar.host.transport import Transport
from instar.oneshot import diet
from instar.oneshot.verify import endpoint_of, fetch_by, kind_of, own_header, server_of
from instar.targets.contents import ModuleContents
from instar.targets.module_store import collect, mark_used
from instar.targets.unpack import hash_file, unpack
from instar.trust.module import module_digest
from instar.trust.paths import check_path

TIMES = 5  # a module takes at most about this many times its archive: itself, and unpacked
LOCK_S = 30.0  # for the line's lock, which is held while a release is unpacked or `current` moves
LEAST_S, MOST_S = 0.1, 3600.0


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    try:
        release = _run(options)
    except InstarError as error:
        print(json.dumps({"ok": False, "error": error.as_json(), "kind": kind_of(error)}), flush=True)
        return error.exit_status
    except OSError as error:
        fault = MachineError("machine", f"cannot fetch the module: {error}")
        print(json.dumps({"ok": False, "error": fault.as_json(), "kind": "machine"}), flush=True)
        return fault.exit_status
    print(json.dumps({"ok": True, "release": release}), flush=True)
    return 0


def _run(options: argparse.Namespace) -> str:
    name, release = check_name(options.name), Release(options.version, options.digest)
    check_path(options.target, "target")
    layout = Layout(options.state)
    server_of(layout)  # before anything is made: a wrong --state changes nothing
    wanted = Wanted(layout, layout.module(name), name, release, options.target)
    end = time.monotonic() + options.within
    if not wanted.is_there():
        make_folder(wanted.place.incoming, 0o700)
        with RoleLock(wanted.place.fetching) as lock:
            lock.acquire(max(0.0, end - time.monotonic()))
            if not wanted.is_there():  # whom we waited for may have fetched the same
                wanted.bring(options, end)
        if not wanted.is_there():
            text = f"cannot use {release.name} of {name}: it is not the one with digest {release.digest}"
            raise TrustError("altered-manifest", text)
    mark_used(wanted.line.folder(release.name), time.time())
    return release.name


class Wanted:
    """One release of one module, wanted on this node."""

    def __init__(self, layout: Layout, place: ModuleLayout, name: str, release: Release, target: str) -> None:
        self.layout, self.place, self.name, self.release, self.target = layout, place, name, release, target
        self.line, self.contents = Line(place), ModuleContents(name)
        self.part = place.incoming / f"{release.digest}.part"

    def is_there(self) -> bool:
        """Whether exactly this release is on the disk, whole. Its folder's name holds 12 digits only."""
        if not self.line.is_valid(self.release.name):
            return False
        manifest = (self.line.folder(self.release.name) / MANIFEST).read_bytes()
        return module_digest(manifest) == self.release.digest

    def bring(self, options: argparse.Namespace, end: float) -> None:
        """Whoever calls holds the lock on fetching."""
        for path in self.place.incoming.iterdir():
            if path != self.part:
                remove(path)  # of another release, cut off: whoever wants that begins anew
        make_folder(self.line.layout.releases)
        check_flags(self.line.layout.releases)
        network = _settings(self.layout).network
        proxy, program = options.proxy or network.proxy, own_header("agent")
        server = read_artifacts(self.layout) or server_of(self.layout)
        transport = Transport(endpoint_of(self.layout, server, proxy, program, options.timeout))
        try:
            length, sha256 = self._fetch(transport, network.rate_bytes_s, end)
        finally:
            transport.close()
        reach("module:fetched")
        self._keep(length, sha256)

    def _fetch(self, transport: Transport, rate_bytes_s: int, end: float) -> tuple[int, str]:
        diet.apply()
        from instar.oneshot.metadata import verify_target

        found = verify_target(self.layout.trust, self.target, fetch_by(transport), datetime.now(UTC))
        for field, want in self.contents.promise(self.release).items():
            signed = found.custom.get(field)
            if signed != want:
                text = f"{self.target}: the job wants {field} {want}, the signed metadata says {signed}"
                raise TrustError("wish-differs", text)
        check_space(self.place.incoming, found.length * TIMES)
        limits = Limits(rate_bytes_s, deadline_s=max(0.0, end - time.monotonic()))
        fetch(transport, f"/v1/{found.url_path}", self.part, found.length, limits)
        return found.length, found.sha256

    def _keep(self, length: int, sha256: str) -> None:
        """Check the fetched archive, unpack it, and make room."""
        if hash_file(self.part) != (length, sha256):
            remove(self.part)
            text = f"the fetched bytes are not the signed ones: expected SHA-256 {sha256}"
            raise TrustError("altered-blob", text)
        with RoleLock(self.place.lock) as lock:
            lock.acquire(LOCK_S)
            unpack(self.part, self.line, self.release, DISK, self.contents)
            reach("module:unpacked")
            try:
                remove(self.part)
                collect(self.line, self.place, time.time())
            except OSError as error:
                raise failed("tidy", self.place.folder, error) from error


def _settings(layout: Layout) -> Settings:
    try:
        return read_config(layout)
    except InputError as error:
        print(error.text, file=sys.stderr)
        return Settings()


def _seconds(text: str) -> float:
    """Whatever the caller has time for, within reason."""
    return min(MOST_S, max(LEAST_S, float(text)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="instar fetch-module",
        description="Bring one signed release of a module onto this node, unless it is there.",
    )
    parser.add_argument("--state", type=Path, required=True, help="the node's state folder")
    parser.add_argument("--name", required=True, help="the module, such as disk.usage")
    parser.add_argument("--version", required=True, help="its version, such as 1.0.0")
    parser.add_argument("--digest", required=True, help="its module digest, SHA-384")
    parser.add_argument("--target", required=True, help="target path, such as module/disk.usage-1.0.0.tar.gz")
    parser.add_argument("--proxy", default="", help="http://host:port")
    parser.add_argument("--within", type=_seconds, default=MOST_S, help="seconds for the whole (%(default)g)")
    parser.add_argument(
        "--timeout", type=_seconds, default=20.0, help="seconds for each answer (%(default)g)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
