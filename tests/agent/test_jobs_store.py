"""The jobs on the disk: what is where, what is synced, and what a kill, a power cut or a full disk leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from instar.agent.spares import COUNT, SIZE
from instar.agent.store import KEPT, DiskStore
from instar.core.errors import MachineError
from instar.host.files import Disk
from instar.wire.codec import encode
from instar.wire.messages import Job, Result
from tests.agent.working import at_once, world

__all__ = ["world"]


def names(folder: Path) -> list[str]:
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in found if not name.startswith("spare/")]


def test_killed_between_result_and_move(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.receive(Job("x", "m"))
    store.start("x")
    store.finish(Result("x", True, {"a": 1}))
    (tmp_path / "outbox" / "x.json").rename(tmp_path / "running" / "000000000001.x.json")
    again = DiskStore(tmp_path)
    assert again.recover() == []
    assert again.result("x") == Result("x", True, {"a": 1})
    assert names(tmp_path) == ["outbox/x.json"]


def test_a_torn_result_is_none(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.receive(Job("x", "m"))
    store.start("x")
    path = tmp_path / "running" / "000000000001.x.json"
    whole = encode(Result("x", True, {"a": 1})).encode()
    for size in (0, 1, 20, len(whole) - 1):
        again = tmp_path / f"again{size}"
        (again / "running").mkdir(parents=True)
        (again / "running" / path.name).write_bytes(path.read_bytes() + b"\n" + whole[:size])
        found = DiskStore(again)
        found.recover()
        result = found.result("x")
        assert result is not None
        assert result.code == "interrupted"
        assert DiskStore(again).result("x") == result


def test_files_of_an_older_agent_are_read(tmp_path: Path) -> None:
    for folder in ("inbox", "running", "outbox", "done"):
        (tmp_path / folder).mkdir()
    (tmp_path / "inbox" / "000000000007.new.json").write_text(encode(Job("new", "m")))
    (tmp_path / "running" / "000000000005.cut.json").write_text(encode(Job("cut", "m")))
    (tmp_path / "running" / "000000000006.both.json").write_text(encode(Job("both", "m")))
    (tmp_path / "outbox" / "both.json").write_text(encode(Result("both", True)))
    (tmp_path / "outbox" / "out.json").write_text(encode(Result("out", True)))
    (tmp_path / "done" / "old.json").write_text(encode(Result("old", True)))
    store = DiskStore(tmp_path)
    assert [(each.job.id, each.received) for each in store.recover()] == [("new", 0.0)]
    assert set(store.unacknowledged()) == {"cut", "both", "out"}
    assert all(store.known(name) for name in ("new", "cut", "both", "out", "old"))
    store.receive(Job("next", "m"))
    assert "inbox/000000000008.next.json" in names(tmp_path)
    for name in ("cut", "both", "out"):
        result = store.result(name)
        assert result is not None
        assert result.ok is (name != "cut")
        store.acknowledged(name)
    assert DiskStore(tmp_path).unacknowledged() == []


def test_when_it_was_received_is_kept(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, lambda: 1234.5)
    store.receive(Job("x", "m", args={"received": 7}))
    assert [each.received for each in DiskStore(tmp_path).recover()] == [1234.5]


def test_unreadable_files_are_set_aside(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.receive(Job("good", "m"))
    for folder in ("inbox", "running"):
        (tmp_path / folder / f"000000000099.bad-{folder}.json").write_text('{"t": "jo')
        (tmp_path / folder / f"000000000098.other-{folder}.json").write_text(encode(Job("another", "m")))
    (tmp_path / "outbox" / "bad2.json").write_text("")
    (tmp_path / "inbox" / "notes.txt").write_text("not ours")
    (tmp_path / "inbox" / ".000000000100.x.json.new").write_text("half")
    again = DiskStore(tmp_path)
    assert [each.job.id for each in again.recover()] == ["good"]
    assert again.result("bad2") is None
    assert len(list(tmp_path.rglob("*.unreadable"))) == 5
    assert not (tmp_path / "inbox" / ".000000000100.x.json.new").exists()


class Full(Disk):
    """A disk without room for new data, once `full`."""

    full = False

    def append(self, path: Path, data: bytes, mode: int) -> None:
        if self.full:
            super().append(path, data[: len(data) // 2], mode)
            raise OSError(28, "No space left on device")
        super().append(path, data, mode)


def test_a_result_that_does_not_fit_on_the_disk_is_held_in_memory(tmp_path: Path) -> None:
    disk = Full()
    store = DiskStore(tmp_path, disk=disk)
    store.receive(Job("x", "m"))
    store.start("x")
    disk.full = True
    with pytest.raises(MachineError, match="cannot write"):
        store.finish(Result("x", True))
    assert store.unacknowledged() == ["x"]
    assert store.result("x") == Result("x", True)
    again = DiskStore(tmp_path, disk=disk)  # killed now: the disk knows of no result, and still has no room
    again.recover()
    result = again.result("x")
    assert result is not None
    assert result.code == "interrupted"
    again.acknowledged("x")
    assert DiskStore(tmp_path).unacknowledged() == []
    store = DiskStore(tmp_path)
    assert store.recover() == []
    assert store.known("x")


def test_memory_of_the_past_is_bounded(tmp_path: Path) -> None:
    DiskStore(tmp_path)
    for number in range(KEPT + 10):
        (tmp_path / "done" / f"d{number:04}.json").write_text("{}")
    store = DiskStore(tmp_path)
    assert len(list((tmp_path / "done").iterdir())) == KEPT
    assert not store.known("d0000")
    assert store.known(f"d{KEPT + 9:04}")


def ready(folder: Path, boot: str = "boot") -> DiskStore:
    """A store that has spares."""
    store = DiskStore(folder, boot_id=boot, apart=at_once)
    store.receive(Job("first", "m"))
    store.finish(Result("first", True))
    store.acknowledged("first")
    return store


@pytest.mark.parametrize("soon", [True, False])
def test_begun_at_once_counts_as_begun_in_another_boot(tmp_path: Path, soon: bool) -> None:
    ready(tmp_path).receive(Job("x", "m"), soon=soon)
    assert [each.job.id for each in DiskStore(tmp_path, boot_id="boot").recover()] == ["x"]
    store = DiskStore(tmp_path, boot_id="another")
    assert [each.job.id for each in store.recover()] == ([] if soon else ["x"])
    result = store.result("x")
    assert (result.code if result else "") == ("interrupted" if soon else "")


def test_without_a_boot_id_the_start_is_synced(tmp_path: Path) -> None:
    ready(tmp_path, "").receive(Job("x", "m"), soon=True)
    assert [each.job.id for each in DiskStore(tmp_path, boot_id="boot").recover()] == ["x"]


@pytest.mark.parametrize("result", [None, Result("x", True, {"a": 1})])
def test_a_job_is_found_where_its_spare_was(tmp_path: Path, result: Result | None) -> None:
    """The power went before its new name was on the disk."""
    store = ready(tmp_path)
    store.receive(Job("x", "m"))
    if result is not None:
        store.finish(result)
    (path,) = list(tmp_path.rglob("*x.json"))
    path.rename(tmp_path / "spare" / "1-1-00000000")
    again = DiskStore(tmp_path, boot_id="another")
    assert [each.job.id for each in again.recover()] == ([] if result else ["x"])
    assert again.result("x") == result
    assert list((tmp_path / "spare").iterdir()) == []
    again.receive(Job("y", "m"))
    assert len(names(tmp_path)) == 3


def test_what_is_found_twice_is_not_taken_in_again(tmp_path: Path) -> None:
    store = ready(tmp_path)
    store.receive(Job("x", "m"))
    (path,) = (tmp_path / "inbox").iterdir()
    (tmp_path / "spare" / "1-1-00000000").write_bytes(path.read_bytes())
    (tmp_path / "spare" / "1-2-00000000").write_bytes(b"\0" * 10 + b"{")
    again = DiskStore(tmp_path, boot_id="boot")
    assert [each.job.id for each in again.recover()] == ["x"]
    assert list((tmp_path / "spare").iterdir()) == []


def test_a_disk_without_room_for_spares_does_without(tmp_path: Path) -> None:
    (tmp_path / "spare").write_text("in the way")
    store = DiskStore(tmp_path, boot_id="boot", apart=at_once)
    for name in ("x", "y"):
        store.receive(Job(name, "m"), soon=True)
        store.start(name)
        store.finish(Result(name, True))
    again = DiskStore(tmp_path)
    assert again.recover() == []
    assert set(again.unacknowledged()) == {"x", "y"}


def test_what_is_synced(tmp_path: Path) -> None:
    """Two before `taken`, one before the run, one before the result is sent, none for the ack; where a spare
    is ready and the run follows at once, one for both and one for the result."""
    calls: list[str] = []

    class Counting(Disk):
        def write_new(self, path: Path, data: bytes, mode: int) -> None:
            calls.append("file")
            super().write_new(path, data, mode)

        def append(self, path: Path, data: bytes, mode: int) -> None:
            calls.append("file")
            super().append(path, data, mode)

        def write_over(self, path: Path, data: bytes, offset: int) -> None:
            calls.append("over")
            super().write_over(path, data, offset)

        def sync_folder(self, path: Path) -> None:
            calls.append(path.name)
            super().sync_folder(path)

    made: list[Callable[[], None]] = []
    store = DiskStore(tmp_path, disk=Counting(), boot_id="boot", apart=made.append)
    steps: list[tuple[Callable[[], None], list[str]]] = [
        (lambda: store.receive(Job("x", "m"), soon=False), ["file", "inbox"]),
        (lambda: store.start("x"), ["running"]),
        (lambda: store.finish(Result("x", True)), ["file"]),
        (lambda: store.acknowledged("x"), []),
        (lambda: made.pop()(), [tmp_path.name, *["file"] * COUNT, "spare"]),
        (lambda: store.receive(Job("y", "m"), soon=True), ["over"]),
        (lambda: store.start("y"), []),
        (lambda: store.finish(Result("y", True)), ["over"]),
        (lambda: store.acknowledged("y"), []),
        (lambda: store.receive(Job("z", "m"), soon=False), ["over"]),
        (lambda: store.start("z"), ["running"]),
        (lambda: store.finish(Result("z", True, stderr="x" * SIZE)), ["file"]),
    ]
    for step, expected in steps:
        calls.clear()
        step()
        assert calls == expected
    assert json.loads((tmp_path / "done" / "x.json").read_text().splitlines()[1])["received"] > 0
