"""The rehearsal of a service module: the agent starts and stops it, on a copy of its data that is made here.

The agent, because only there a module finds what it will find later: the updater's unit may do far less. The
server is not asked: the trial does that right after (docs/adr/0010-modules.md).
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from os import stat_result
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, MachineError
from instar.core.journal import Reason
from instar.engine.target import Failed, NotNow
from instar.host.disks import check_space
from instar.host.files import failed, make_folder, remove_tree
from instar.host.sockets import ask
from instar.targets.kit import Kit
from instar.trust.module import ModuleManifest

STATE = "state.json"  # what `context.save` keeps
MOST_DATA = 256 << 20  # bytes that are copied; of a module that keeps more, only its state is
MOST_S = 600.0  # whatever the manifest says of its timeouts
SPARE_S = 15.0  # for the agent to notice the end, and to clear away what is left
ASK_S = 30.0  # one question; the agent holds it open for a third of that
NOT_ITS_FAULT = ("no-wasmtime", "no-user", "no-landlock", "bad-job")  # the machine's, or ours


def rehearse(kit: Kit, manifest: ModuleManifest, digest: str, data: Path, scratch: Path) -> float:
    """Have the module started and stopped; seconds that it took.

    `data` is its data folder, which may be absent; `scratch` is ours to make and to remove. Raises Failed with
    the runner's code, NotNow while the agent is away, MachineError when this machine cannot rehearse.
    """
    remove_tree(scratch, kit.disk)
    make_folder(scratch, 0o700, kit.disk)
    try:
        _copy(data, scratch / "data")
        return _judge(_ask(kit, manifest, digest, scratch / "data"))
    finally:
        remove_tree(scratch, kit.disk)


def _ask(kit: Kit, manifest: ModuleManifest, digest: str, data: Path) -> dict[str, Any]:
    """Put the question until the end is known: it may take longer than an answer may."""
    own_s = manifest.timeouts.ready_s + manifest.timeouts.stop_s
    within_s = min(MOST_S, kit.settings.rehearsal.within_s + own_s)
    about = {"module": manifest.name, "version": manifest.version, "digest": digest}
    request = {"do": "check-module", **about, "data": str(data), "within_s": within_s}
    end = kit.clock.monotonic() + within_s + SPARE_S
    while kit.clock.monotonic() < end:
        try:
            said = ask(kit.layout.socket("agent"), request, ASK_S)
        except InputError as error:
            if error.code == "unknown-command":
                text = "the agent is of a release that runs no modules yet"
                raise Failed(Reason("agent-too-old", text), blame=False) from None
            raise
        except MachineError as error:  # a trial would need the agent too
            raise NotNow(Reason("agent-away", f"cannot rehearse {manifest.name}: {error.text}")) from None
        if said.get("done"):
            return said
    raise MachineError("no-answer", f"cannot rehearse {manifest.name}: the agent does not say how it went")


def _judge(said: dict[str, Any]) -> float:
    seconds = said.get("seconds")
    if said.get("passed") is True:
        return float(seconds) if isinstance(seconds, (int, float)) else 0.0
    code, text = str(said.get("code", "rehearsal-failed"))[:64], str(said.get("text", "it said no"))[:600]
    raise Failed(Reason(code, text), blame=code not in NOT_ITS_FAULT)


def _copy(data: Path, into: Path) -> None:
    """A copy of what the module keeps, taken while it may be writing: a file that goes meanwhile is left out.
    It is ours; the runner gives it to the module's user.

    Raises MachineError `no-space`, `disk-failed`.
    """
    try:
        into.mkdir(0o700)
        if not data.is_dir():
            return
        files = list(_files(data))
        size = sum(status.st_size for _, status in files)
        if size > MOST_DATA:
            files = [(path, status) for path, status in files if path == data / STATE]
        else:
            check_space(into, size)
        for path, status in files:
            _copy_file(path, status, into / path.relative_to(data))
    except OSError as error:
        raise failed("copy", data, error) from error


def _files(folder: Path) -> Iterator[tuple[Path, stat_result]]:
    """Folders and plain files below `folder`, a folder before what is in it; no link is followed."""
    for path in sorted(folder.iterdir()):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            yield path, status
            yield from _files(path)
        elif stat.S_ISREG(status.st_mode):
            yield path, status


def _copy_file(path: Path, status: stat_result, into: Path) -> None:
    try:
        if stat.S_ISDIR(status.st_mode):
            into.mkdir(0o700)
        else:
            shutil.copyfile(path, into, follow_symlinks=False)
    except FileNotFoundError:
        return
    into.chmod(stat.S_IMODE(status.st_mode) & 0o777)
