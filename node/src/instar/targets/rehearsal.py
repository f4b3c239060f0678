"""The rehearsal of a service module: started and stopped again by a runner, on a copy of its data.

It is local: no server is asked, since only the agent could carry the question, and the trial asks it all
the same (docs/adr/0010-modules.md).
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from platform import machine
from typing import Any

from instar.core.errors import InputError
from instar.core.journal import Reason
from instar.engine.target import Failed
from instar.host.control_line import Talk, talk
from instar.host.disks import check_space
from instar.host.files import failed, make_folder, remove_tree
from instar.targets.kit import Kit
from instar.trust.module import ModuleManifest

STATE = "state.json"  # what `context.save` keeps
MOST_DATA = 256 << 20  # bytes that are copied; of a module that keeps more, only its state is
MOST_S = 600.0  # whatever the manifest says of its timeouts
NOT_ITS_FAULT = ("no-wasmtime", "no-user", "bad-job")  # the machine's, or ours


def rehearse(
    kit: Kit, manifest: ModuleManifest, folder: Path, digest: str, data: Path, scratch: Path
) -> float:
    """Start and stop the module that lies in `folder`; seconds that it took.

    `data` is its data folder, which may be absent; `scratch` is ours to make and to remove. Raises Failed with
    the runner's code, MachineError when this machine cannot rehearse.
    """
    own_s = manifest.timeouts.ready_s + manifest.timeouts.stop_s
    within_s = min(MOST_S, kit.settings.rehearsal.within_s + own_s)
    remove_tree(scratch, kit.disk)
    make_folder(scratch, 0o700, kit.disk)
    copy = scratch / "data"
    try:
        _copy(data, copy)
        request = _request(manifest, folder, digest, copy, within_s)
        said = talk(kit.program.command("runner"), request, copy, manifest.name, within_s)
    finally:
        remove_tree(scratch, kit.disk)
    _judge(said)
    return said.ended.seconds


def _judge(said: Talk) -> None:
    if said.cut:
        raise Failed(Reason("too-much-output", "the rehearsal said more than a module may"))
    ended_well = said.ended.status == 0 and not said.ended.late
    if said.answer is None or (said.answer["ok"] and not ended_well):
        raise Failed(Reason("rehearsal-failed", said.ended.describe("the rehearsal")))
    if said.answer["ok"]:
        return
    told = said.answer.get("error")
    fault = told if isinstance(told, dict) else {}
    code, text = str(fault.get("code", "module-failed"))[:64], str(fault.get("text", "it said no"))[:500]
    raise Failed(Reason(code, text), blame=code not in NOT_ITS_FAULT)


def _request(
    manifest: ModuleManifest, folder: Path, digest: str, data: Path, within_s: float
) -> dict[str, Any]:
    try:
        entry = manifest.entry_for(machine())
    except InputError as error:
        raise Failed(Reason(error.code, error.text)) from None
    about = {
        "name": manifest.name,
        "version": manifest.version,
        "digest": digest,
        "folder": str(folder),
        "runs": manifest.runs,
        "mode": manifest.mode,
        "entry": entry,
        "stateful": manifest.stateful,
    }
    touches = asdict(manifest.touches)
    return {
        "v": 1,
        "do": "check",
        "module": about,
        "args": {},
        "data": str(data),
        "limits": {"seconds": within_s, **asdict(manifest.limits)},
        "touches": touches,
        "user": touches.pop("user"),
    }


def _copy(data: Path, into: Path) -> None:
    """A copy of what the module keeps, taken while it may be writing: a file that goes meanwhile is left out.

    Raises MachineError `no-space`, `disk-failed`.
    """
    try:
        into.mkdir(0o700)
        if not data.is_dir():
            return
        _own_as(data, into)
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


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
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


def _copy_file(path: Path, status: os.stat_result, into: Path) -> None:
    try:
        if stat.S_ISDIR(status.st_mode):
            into.mkdir(0o700)
        else:
            shutil.copyfile(path, into, follow_symlinks=False)
    except FileNotFoundError:
        return
    into.chmod(stat.S_IMODE(status.st_mode) & 0o777)
    _own_as(path, into)


def _own_as(path: Path, into: Path) -> None:
    """Give `into` to whom `path` belongs: the module may run as another user than we."""
    status = path.lstat()
    if os.geteuid() == 0 and (status.st_uid, status.st_gid) != (0, 0):
        os.chown(into, status.st_uid, status.st_gid, follow_symlinks=False)
