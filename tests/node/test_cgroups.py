"""cgroup v2: real groups where this machine has some, the limit files against a folder that plays the tree."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.host import cgroups
from instar.host.cgroups import Groups, Leaf, find
from instar.host.marks import Mark

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
WITHIN_S = 30.0
NOBODY = 1 << 23  # more than any process's number
real = pytest.mark.skipif(find() is None, reason="no cgroup v2 of ours on this machine")


class Tree:
    """A folder with the files of a cgroup tree, and the /proc that speaks of it."""

    def __init__(self, folder: Path, own: str = "/", root: str = "/") -> None:
        self.top, self.proc, self.systemd = folder / "my cgroup", folder / "proc", folder / "systemd"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self/cgroup").write_text(f"9:name=systemd:/elsewhere\n0::{own}\n")
        path = str(self.top).replace(" ", "\\040")
        lines = [
            "24 1 0:22 / /sys rw - sysfs sysfs rw",
            f"30 24 0:27 {root} {path} rw shared:9 - cgroup2 none rw",
        ]
        (self.proc / "self/mountinfo").write_text("\n".join(lines) + "\n")
        self.group(self.top)

    def group(self, folder: Path, controllers: str = "memory pids cpu io") -> Path:
        folder.mkdir(exist_ok=True, parents=True)
        for name in ("cgroup.procs", "cgroup.subtree_control"):
            (folder / name).touch()
        (folder / "cgroup.controllers").write_text(controllers)
        (folder / "cgroup.events").write_text("populated 0\nfrozen 0\n")
        return folder

    def find(self) -> Groups | None:
        return find(self.proc, self.systemd)


def delegate(folder: Path) -> None:
    os.setxattr(folder, "user.delegate", b"1")


def can_delegate(folder: Path) -> bool:
    try:
        delegate(folder)
    except OSError:
        return False
    os.removexattr(folder, "user.delegate")
    return True


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_below_the_root_a_group_of_our_own_is_made(tree: Tree) -> None:
    groups = tree.find()
    assert groups is not None
    assert groups.folder == tree.top / f"instar-{os.getpid()}"
    groups.open()
    groups.open()
    assert (groups.folder / "agent" / "cgroup.procs").read_text() == str(os.getpid())
    assert (tree.top / "cgroup.subtree_control").read_text() == "+cpu"  # a folder keeps the last word only


def test_where_systemd_rules_only_a_delegated_group_is_ours(tmp_path: Path) -> None:
    tree = Tree(tmp_path, own="/system.slice/instar-agent.service")
    tree.systemd.mkdir()
    unit = tree.group(tree.top / "system.slice" / "instar-agent.service")
    if not can_delegate(unit):
        pytest.skip("this file system has no extended attributes for users")
    if os.geteuid() == 0:
        assert tree.find() is None
    delegate(unit)
    (unit / "cgroup.procs").write_text("4711\n4712\n")
    groups = tree.find()
    assert groups is not None
    assert groups.folder == unit
    groups.open()
    assert (unit / "agent" / "cgroup.procs").read_text() == "4712"  # all in it were moved
    assert (unit / "cgroup.subtree_control").read_text() == "+cpu"
    assert (tree.top / "cgroup.subtree_control").read_text() == ""  # the parent is not ours


def test_without_systemd_only_the_root_is_ours(tmp_path: Path) -> None:
    tree = Tree(tmp_path, own="/somebodys")
    tree.group(tree.top / "somebodys")
    if os.geteuid() == 0:
        assert tree.find() is None


@pytest.mark.parametrize(("own", "expected"), [("/instar-77/agent", "instar"), ("/instar-77", "instar")])
def test_started_by_an_agent_in_its_leaf(tmp_path: Path, own: str, expected: str) -> None:
    tree = Tree(tmp_path, own=own)
    tree.group(tree.top / own[1:])
    groups = tree.find()
    assert groups is not None
    assert groups.folder == tree.top / f"instar-{os.getpid()}"


def test_started_by_an_agent_in_a_delegated_group(tmp_path: Path) -> None:
    tree = Tree(tmp_path, own="/unit/agent")
    unit = tree.group(tree.top / "unit")
    tree.group(unit / "agent")
    tree.systemd.mkdir()
    if not can_delegate(unit):
        pytest.skip("this file system has no extended attributes for users")
    delegate(unit)
    groups = tree.find()
    assert groups is not None
    assert groups.folder == unit


def test_a_namespace_shows_a_part_of_the_tree(tmp_path: Path) -> None:
    tree = Tree(tmp_path, own="/docker/abc", root="/docker/abc")
    groups = tree.find()
    assert groups is not None
    assert groups.folder.parent == tree.top


@pytest.mark.parametrize(
    ("cgroup", "mounts"),
    [
        ("9:memory:/x\n", None),  # version 1 alone
        ("", None),
        (None, "24 1 0:22 / /sys rw - sysfs sysfs rw\n"),
        (None, ""),
        (None, "30 - cgroup2 none rw\n"),
        ("0::/../outside\n", None),
        ("0::/gone\n", None),
    ],
)
def test_no_tree_is_no_error(tree: Tree, cgroup: str | None, mounts: str | None) -> None:
    if cgroup is not None:
        (tree.proc / "self/cgroup").write_text(cgroup)
    if mounts is not None:
        (tree.proc / "self/mountinfo").write_text(mounts)
    assert tree.find() is None
    assert find(tree.proc / "absent") is None


def test_limits_are_written_where_the_controllers_are(tree: Tree) -> None:
    folder = tree.group(tree.top / "job-1")
    for name in ("memory.max", "pids.max", "memory.oom.group", "memory.swap.max"):
        (folder / name).write_text("max")
    leaf = Leaf(folder)
    leaf.limit(1 << 20, 7)
    read = {p.name: p.read_text() for p in folder.iterdir()}
    assert (read["memory.max"], read["pids.max"], read["memory.oom.group"]) == ("1048576", "7", "1")
    assert read["memory.swap.max"] == "0"
    leaf.limit(0, 0)
    assert ((folder / "memory.max").read_text(), (folder / "pids.max").read_text()) == ("max", "max")


def test_nothing_is_written_where_they_are_not(tree: Tree) -> None:
    folder = tree.group(tree.top / "job-1")
    leaf = Leaf(folder)
    leaf.limit(1 << 20, 7)
    assert not (folder / "memory.max").exists()
    assert (leaf.peak(), leaf.out_of_memory(), leaf.refused_forks()) == (0, False, 0)


def test_what_the_kernel_counted(tree: Tree) -> None:
    folder = tree.group(tree.top / "job-1")
    (folder / "memory.peak").write_text("123456\n")
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 2\noom_group_kill 1\n")
    (folder / "pids.events").write_text("max 3\n")
    leaf = Leaf(folder)
    assert (leaf.peak(), leaf.out_of_memory(), leaf.refused_forks()) == (123456, True, 3)
    (folder / "memory.events").write_text("oom_kill 0\n")
    (folder / "memory.peak").write_text("?\n")
    assert (leaf.peak(), leaf.out_of_memory()) == (0, False)


def test_kill_one_by_one_where_the_kernel_is_old(tree: Tree) -> None:
    folder = tree.group(tree.top / "job-1")
    child = subprocess.Popen(SLEEP)
    (folder / "cgroup.procs").write_text(f"{child.pid}\n")
    Leaf(folder).kill()
    assert child.wait(WITHIN_S) == -9


# --- the real tree


@pytest.fixture
def groups() -> Iterator[Groups]:
    found = find()
    assert found is not None
    found.open()
    yield found
    found.close()
    assert not found.folder.exists()


def put_into(folder: Path, pid: int) -> None:
    """Any agent on this machine, another worker's too, tidies a group of a dead agent away while nobody is in it."""
    end = time.monotonic() + WITHIN_S
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            Leaf(folder).add(pid)
            return
        except OSError:
            if time.monotonic() >= end:
                raise


@real
def test_a_leaf_holds_what_left_its_session(groups: Groups) -> None:
    code = (
        "import os, sys, time\nsys.stdin.read(1)\n"
        "if os.fork() == 0: os.setsid(); print(os.getpid(), flush=True); time.sleep(600)\n"
    )
    leaf = groups.make("job-1")
    child = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
    leaf.add(child.pid)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("x")
    child.stdin.close()
    escaped = int(child.stdout.readline())
    child.wait(WITHIN_S)
    child.stdout.close()
    assert leaf.pids() == [escaped]
    assert leaf.populated()
    assert leaf.remove(WITHIN_S)
    assert not leaf.folder.exists()
    assert leaf.remove()


@real
def test_a_leaf_of_the_same_name_is_ended_first(groups: Groups) -> None:
    child = subprocess.Popen(SLEEP)
    groups.make("module-x").add(child.pid)
    again = groups.make("module-x")
    assert child.wait(WITHIN_S) == -9
    assert again.pids() == []
    again.remove()


@real
def test_what_a_dead_agent_left_is_tidied_up(groups: Groups) -> None:
    """Its runs are killed; its services may still be saving their state."""
    old = groups.folder.parent / f"instar-{NOBODY + os.getpid()}"
    run, service = subprocess.Popen(SLEEP), subprocess.Popen(SLEEP)
    put_into(old / "module-x", service.pid)
    put_into(old / "job-3", run.pid)
    (old / "agent").mkdir(exist_ok=True)
    groups.open()
    assert run.wait(WITHIN_S) == -9
    assert service.poll() is None
    service.kill()
    service.wait()
    groups.open()
    assert not old.exists()


@real
def test_a_living_agent_is_let_be(groups: Groups) -> None:
    other = groups.folder.parent / f"instar-{NOBODY + os.getpid()}"
    agent, run = subprocess.Popen(SLEEP), subprocess.Popen(SLEEP)
    put_into(other / "agent", agent.pid)
    put_into(other / "job-1", run.pid)
    groups.open()
    time.sleep(0.1)
    assert run.poll() is None
    for process, name in ((run, "job-1"), (agent, "agent")):
        process.kill()
        process.wait()
        assert Leaf(other / name).remove(WITHIN_S)
    assert Leaf(other).remove(WITHIN_S)


@real
def test_one_that_started_in_a_leaf_looks_outside(groups: Groups) -> None:
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\nfrom instar.host.cgroups import find\nprint(find().folder)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path.parent == groups.folder.parent
    assert path != groups.folder


def test_the_agents_own_leaf_is_called_as_the_layout_says() -> None:
    assert cgroups.AGENT == "agent"
    assert not cgroups.LEAF.fullmatch("job-../x")


# --- marks


def test_a_mark_is_handed_down_and_found() -> None:
    code = (
        "import os, sys, time\nsys.stdin.read(1)\n"
        "if os.fork() == 0:\n os.setsid()\n"
        " if os.fork() == 0: print(os.getpid(), flush=True); os.execv('/bin/sleep', ['sleep', '600'])\n"
        " os._exit(0)\n"
    )
    mark, other = Mark.unique(1), Mark.unique(2)
    child = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
    mark.put(child.pid)
    assert list(mark.pids()) == [child.pid]
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("x")
    child.stdin.close()
    escaped = int(child.stdout.readline())
    child.wait(WITHIN_S)
    child.stdout.close()
    assert list(mark.pids()) == [escaped]
    assert list(other.pids()) == []
    policy = os.sched_getscheduler(0)
    assert mark.kill()
    assert list(mark.pids()) == []
    assert mark.kill()
    assert os.sched_getscheduler(0) == policy
    end = time.monotonic() + WITHIN_S
    while Path(f"/proc/{escaped}/cmdline").exists() and Path(f"/proc/{escaped}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_marks_differ() -> None:
    values = {Mark.unique(number).value for number in range(1000)}
    assert len(values) == 1000
    assert all(0 < value < 1 << 63 for value in values)
