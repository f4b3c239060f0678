"""host.files, host.locks, host.disks: what a full disk, a kill or a rival leaves behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.host import disks, files
from instar.host.files import Disk
from instar.host.locks import RoleLock
from instar.host.services import RoleLockProbe


class Failing(Disk):
    """Fails one kind of call with an error number; counts on the rest."""

    def __init__(self, call: str, number: int) -> None:
        self.call, self.number = call, number

    def _fail(self, call: str) -> None:
        if call == self.call:
            raise OSError(self.number, os.strerror(self.number))

    def write_new(self, path: Path, data: bytes, mode: int) -> None:
        if self.call == "write_new":
            super().write_new(path, data[: len(data) // 2], mode)  # what fitted
        self._fail("write_new")
        super().write_new(path, data, mode)

    def rename(self, old: Path, new: Path) -> None:
        self._fail("rename")
        super().rename(old, new)

    def symlink(self, target: str, path: Path) -> None:
        self._fail("symlink")
        super().symlink(target, path)

    def mkdir(self, path: Path, mode: int) -> None:
        self._fail("mkdir")
        super().mkdir(path, mode)


def test_a_file_is_replaced_as_a_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "f"
    files.write_atomic(path, b"one", 0o644)
    files.write_atomic(path, b"two", 0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("call", ["write_new", "rename"])
@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "disk-full"), (errno.EDQUOT, "disk-full"), (errno.EIO, "disk-failed")]
)
def test_a_failing_disk_leaves_the_old_file_and_no_rest(
    tmp_path: Path, call: str, number: int, code: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(MachineError, match="cannot write") as caught:
        files.write_atomic(path, b"new bytes", disk=Failing(call, number))
    assert caught.value.code == code
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_rest_of_a_killed_write_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".f.new").write_bytes(b"half of something long")
    files.write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    (tmp_path / ".l.new").symlink_to("nowhere")
    files.point_link(tmp_path / "l", "there")
    assert os.readlink(tmp_path / "l") == "there"


def test_a_link_laid_at_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / ".f.new").symlink_to("victim")
    with pytest.raises(MachineError):
        files.write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine"


@pytest.mark.parametrize("call", ["symlink", "rename"])
def test_a_failing_disk_leaves_the_old_link(tmp_path: Path, call: str) -> None:
    link = tmp_path / "current"
    files.point_link(link, "old")
    with pytest.raises(MachineError) as caught:
        files.point_link(link, "new", Failing(call, errno.ENOSPC))
    assert caught.value.code == "disk-full"
    assert os.readlink(link) == "old"


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    files.remove(tmp_path / "absent")
    files.remove_tree(tmp_path / "absent")


def test_a_tree_is_removed_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").write_bytes(b"x")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "kept")
    files.remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    assert (tmp_path / "kept" / "f").exists()


def test_folders_are_made_with_their_parents(tmp_path: Path) -> None:
    files.make_folder(tmp_path / "a" / "b" / "c", 0o700)
    files.make_folder(tmp_path / "a" / "b" / "c", 0o700)
    assert (tmp_path / "a" / "b" / "c").stat().st_mode & 0o777 == 0o700
    with pytest.raises(MachineError) as caught:
        files.make_folder(tmp_path / "x", disk=Failing("mkdir", errno.EROFS))
    assert caught.value.code == "disk-failed"


# --- locks


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    first, second = RoleLock(tmp_path / "l"), RoleLock(tmp_path / "l")
    assert first.try_acquire()
    assert first.try_acquire()  # again by the holder: nothing changes
    assert not second.try_acquire()
    with pytest.raises(MachineError) as caught:
        second.acquire(0.05)
    assert caught.value.code == "lock-held"
    first.release()
    first.release()
    assert second.try_acquire()
    second.release()


def test_a_probe_does_not_keep_the_lock(tmp_path: Path) -> None:
    probe = RoleLockProbe(tmp_path / "l")
    assert not probe.held()
    with RoleLock(tmp_path / "l") as lock:
        lock.acquire(1.0)
        assert probe.held()
    assert not probe.held()


HOLD = """
import sys, time; sys.path[:0] = sys.argv[2:]
from pathlib import Path; from instar.host.locks import RoleLock
lock = RoleLock(Path(sys.argv[1])); lock.acquire(1); print("held", flush=True); time.sleep(30)
"""


def test_a_killed_holder_loses_the_lock(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "l"), *sys.path], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert RoleLockProbe(tmp_path / "l").held()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]
    RoleLock(tmp_path / "l").acquire(1.0)


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    lock = RoleLock(tmp_path / "l")
    lock.acquire(1.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], close_fds=False)
    try:
        lock.release()
        assert not RoleLockProbe(tmp_path / "l").held()
    finally:
        child.kill()
        child.wait()


# --- disks


def test_space_is_asked_for_with_a_reserve(tmp_path: Path) -> None:
    disks.check_space(tmp_path, 0)
    free = disks.free_bytes(tmp_path)
    with pytest.raises(MachineError, match="reserve for the way back") as caught:
        disks.check_space(tmp_path, free + 1)
    assert caught.value.code == "no-space"
    with pytest.raises(MachineError):
        disks.check_space(tmp_path, free)  # it would fit, but nothing would be left


def test_mount_flags_are_named() -> None:
    seen: dict[str, str] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, _, flags, *_ = line.split()
        seen[mounted] = flags
    for mounted, flags in seen.items():
        words = flags.split(",")
        code = "mounted-read-only" if "ro" in words else "mounted-noexec" if "noexec" in words else ""
        if not code or not os.access(mounted, os.R_OK) or list(seen).count(mounted) > 1:
            continue
        try:
            disks.check_flags(Path(mounted))
        except MachineError as error:
            assert error.code in ("mounted-read-only", "mounted-noexec")
            assert mounted in error.text
            return
    pytest.skip("no such file system here")


def test_a_good_folder_passes(tmp_path: Path) -> None:
    disks.check_flags(tmp_path)
