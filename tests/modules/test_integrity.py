"""file.integrity in a real runner: what happens below a folder is told, once, with its number, also after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import Module, Service, wait_for

Get = Callable[[str], Module]


class Watch:
    """The service, watching a folder, and what it has told so far."""

    def __init__(self, module: Module, data: Path, folder: Path) -> None:
        self.module, self.data, self.folder = module, data, folder
        self.service = module.start(data)
        self.seen = 0

    def watch(self, *paths: Path, **more: Any) -> dict[str, Any]:
        words = [str(path) for path in paths or (self.folder,)]
        return self.service.ask("watch", paths=words, **({"every_s": 1.0} | more))

    def settle(self) -> dict[str, Any]:
        """Wait until a round has begun and ended after now."""
        rounds = self.status()["rounds"]
        more = 1 if not self.status()["looking"] else 2
        return wait_for(
            lambda: (s := self.status())["rounds"] >= rounds + more and s["settled"] and s, "a round"
        )  # type: ignore[no-any-return]

    def status(self) -> dict[str, Any]:
        return self.service.ask("status")

    def news(self) -> list[tuple[str, str]]:
        """What is new since the last time: (change, path below the folder)."""
        return [(one["change"], one["path"].removeprefix(f"{self.folder}/")) for one in self.fresh()]

    def fresh(self) -> list[dict[str, Any]]:
        self.settle()
        reply = self.service.ask("changes", since=self.seen)
        assert [one["n"] for one in reply["changes"]] == list(
            range(self.seen + 1, self.seen + 1 + len(reply["changes"]))
        )
        assert (reply["lost"], reply["more"]) == (0, 0)
        self.seen = reply["last"]
        found: list[dict[str, Any]] = reply["changes"]
        return found

    def restart(self, kill: bool) -> None:
        if kill:
            self.service.kill()
        else:
            self.service.stop()
        self.service = self.module.start(self.data)


@pytest.fixture
def module(first_day: Get) -> Module:
    return first_day("file.integrity")


@pytest.fixture
def watch(module: Module, tmp_path: Path) -> Iterator[Watch]:
    folder = tmp_path / "watched"
    folder.mkdir()
    (folder / "old").write_text("old")
    (folder / "sub").mkdir()
    (folder / "sub/inner").write_text("inner")
    made = Watch(module, tmp_path / "data", folder)
    yield made
    made.service.stop()


@pytest.fixture
def watching(watch: Watch) -> Watch:
    watch.watch()
    watch.settle()
    assert watch.news() == []
    return watch


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="instar-open-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


class TestChanges:
    def test_the_base_is_no_change(self, watching: Watch) -> None:
        status = watching.status()
        assert (status["files"], status["last"], status["unreadable"]) == (4, 0, 0)
        assert status["watching"] == [str(watching.folder)]

    def test_added_changed_removed(self, watching: Watch) -> None:
        (watching.folder / "new").write_bytes(b"x" * 3_000_000)
        (watching.folder / "old").write_text("older")
        shutil.rmtree(watching.folder / "sub")
        fresh = {one["path"].rpartition("/")[2]: one for one in watching.fresh()}
        assert {name: one["change"] for name, one in fresh.items()} == {
            "new": "added", "old": "changed", "sub": "removed", "inner": "removed",
        }  # fmt: skip
        assert fresh["new"]["after"]["sha256"] == hashlib.sha256(b"x" * 3_000_000).hexdigest()
        assert fresh["old"]["what"] == ["content", "size", "mtime"]
        assert fresh["old"]["before"]["sha256"] == hashlib.sha256(b"old").hexdigest()
        assert fresh["old"]["after"]["sha256"] == hashlib.sha256(b"older").hexdigest()
        assert watching.news() == []

    def test_permissions_owner_and_type(self, watching: Watch) -> None:
        (watching.folder / "old").chmod(0o4711)
        (watching.folder / "sub").chmod(0o700)
        [old, sub] = watching.fresh()
        assert (old["what"], old["before"]["mode"], old["after"]["mode"]) == (["mode"], "0644", "4711")
        assert (sub["what"], sub["after"]["kind"]) == (["mode"], "folder")
        (watching.folder / "old").unlink()
        (watching.folder / "old").mkdir()
        [old] = watching.fresh()
        assert (old["what"], old["after"]["kind"]) == (["type"], "folder")
        if os.geteuid() == 0:
            os.chown(watching.folder / "sub/inner", 12, 34)
            [inner] = watching.fresh()
            assert (inner["what"], inner["after"]["owner"]) == (["owner"], "12:34")

    def test_renamed_and_replaced(self, watching: Watch) -> None:
        (watching.folder / "old").rename(watching.folder / "moved")
        (watching.folder / "temporary").write_text("inner")
        status = (watching.folder / "sub/inner").stat()
        os.utime(watching.folder / "temporary", ns=(status.st_atime_ns, status.st_mtime_ns))
        (watching.folder / "temporary").rename(watching.folder / "sub/inner")
        fresh = {one["change"]: one for one in watching.fresh()}
        assert fresh.keys() == {"renamed", "changed"}
        assert fresh["renamed"]["old"] == str(watching.folder / "old")
        assert fresh["renamed"]["path"] == str(watching.folder / "moved")
        assert fresh["changed"]["what"] == ["replaced"]

    def test_a_folder_that_is_renamed_takes_all_with_it(self, watching: Watch) -> None:
        (watching.folder / "sub").rename(watching.folder / "dub")
        assert sorted(watching.news()) == [("renamed", "dub"), ("renamed", "dub/inner")]
        assert watching.status()["files"] == 4

    def test_a_hard_link_is_another_file(self, watching: Watch) -> None:
        os.link(watching.folder / "old", watching.folder / "link")
        assert watching.news() == [("added", "link")]  # of the old one only the count of names changed

    def test_an_old_time_of_change_hides_nothing(self, watching: Watch) -> None:
        """Same size, mtime put back: the kernel's own time of change tells."""
        path = watching.folder / "old"
        status = path.stat()
        path.write_text("OLD")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        [old] = watching.fresh()
        assert old["what"] == ["content"]

    def test_links_are_not_followed(self, watching: Watch, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "secret").write_text("x")
        (watching.folder / "link").symlink_to(outside)
        (watching.folder / "loop").symlink_to(".")
        assert sorted(watching.news()) == [("added", "link"), ("added", "loop")]
        (outside / "secret").write_text("y")
        (watching.folder / "link").unlink()
        (watching.folder / "link").symlink_to("/nowhere")
        [link] = watching.fresh()
        assert (link["change"], link["before"]["target"], link["after"]["target"]) == (
            "changed", str(outside), "/nowhere",
        )  # fmt: skip
        assert "content" in link["what"]


class TestStrangeThings:
    def test_names_of_any_bytes(self, watching: Watch) -> None:
        names = [
            b"new\nline",
            b"\xff\xfe",
            b"back\\slash",
            b"\\xff",
            "\u00e4\u4e2d".encode(),
            b"\x01\x1b[2J",
            b"a" * 255,
        ]
        for name in names:
            os.close(os.open(os.fsencode(watching.folder) + b"/" + name, os.O_CREAT | os.O_WRONLY, 0o600))
        assert sorted(watching.news()) == sorted(
            ("added", word)
            for word in (
                "new\nline", "\\xff\\xfe", "back\\\\slash", "\\\\xff", "\u00e4\u4e2d", "\x01\x1b[2J", "a" * 255,
            )
        )  # fmt: skip
        watching.restart(kill=True)
        assert watching.news() == []
        for name in names:
            os.unlink(os.fsencode(watching.folder) + b"/" + name)
        assert {change for change, _ in watching.news()} == {"removed"}

    def test_pipes_sockets_and_devices_are_never_opened(self, watching: Watch) -> None:
        os.mkfifo(watching.folder / "pipe")
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.getcwd()
            os.chdir(watching.folder)
            listener.bind("socket")
            os.chdir(here)
            fresh = {one["path"].rpartition("/")[2]: one["after"]["kind"] for one in watching.fresh()}
        assert fresh == {"pipe": "pipe", "socket": "socket"}

    def test_a_file_that_changes_while_it_is_read(self, watching: Watch) -> None:
        path = watching.folder / "moving"
        stop = threading.Event()

        def write() -> None:
            with path.open("wb") as file:
                file.write(b"x" * 8_000_000)
                while not stop.is_set():
                    file.seek(0)
                    file.write(str(time.monotonic()).encode())
                    file.flush()

        thread = threading.Thread(target=write)
        thread.start()
        try:
            wait_for(path.exists, "the file")
            fresh = [one for one in watching.fresh() if one["path"] == str(path)]
        finally:
            stop.set()
            thread.join()
        assert fresh[0]["change"] == "added"
        assert (fresh[0].get("unstable"), fresh[0]["after"]["sha256"]) == (True, "")
        watching.fresh()  # the last writing, unless it was seen already
        path.chmod(0o600)
        [mode] = watching.fresh()
        assert mode["what"] == ["mode"]
        assert mode["after"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_what_cannot_be_read_is_told_once(self, watch: Watch, module: Module, tmp_path: Path) -> None:
        missing = tmp_path / "missing"
        watch.watch(watch.folder, missing)
        assert [(one["change"], one["path"], one["text"]) for one in watch.fresh()] == [
            ("unreadable", str(missing), "it is not there")
        ]
        assert watch.fresh() == []
        assert watch.status()["first_unreadable"] == [{"path": str(missing), "why": "it is not there"}]
        missing.mkdir()
        (missing / "file").touch()
        assert {(one["change"], one["path"]) for one in watch.fresh()} == {
            ("added", str(missing)), ("added", str(missing / "file")),
        }  # fmt: skip
        assert watch.status()["unreadable"] == 0
        shutil.rmtree(missing)
        assert {one["change"] for one in watch.fresh()} == {"removed"}
        assert watch.fresh() == []

    def test_a_folder_that_is_closed_loses_nothing(
        self, module: Module, tmp_path: Path, reachable: Path
    ) -> None:
        """As another user: root can read everything."""
        if os.geteuid() != 0:
            pytest.skip("needs root to run as somebody else")
        folder = reachable
        (folder / "sub").mkdir()
        (folder / "sub/inner").write_text("x")
        (folder / "closed").write_text("x")
        (folder / "closed").chmod(0o600)
        data = tmp_path / "data"
        data.mkdir()
        child = module.runner.start(module.request(do="serve", data=str(data), user="nobody"), cwd=data)
        child.until("state", "ready")
        service = Service(child)
        service.ask("watch", paths=[str(folder)], every_s=1.0)
        wait_for(lambda: service.ask("status")["settled"], "a round")
        assert service.ask("status")["first_unreadable"] == [
            {"path": str(folder / "closed"), "why": "Permission denied"}
        ]
        (folder / "sub").chmod(0o000)
        wait_for(lambda: service.ask("status")["unreadable"] == 2, "the folder to be closed")
        (folder / "sub").chmod(0o755)
        (folder / "closed").chmod(0o644)
        wait_for(lambda: service.ask("status")["unreadable"] == 0, "the folder to be open")
        rounds = service.ask("status")["rounds"]
        wait_for(lambda: service.ask("status")["rounds"] > rounds, "a round")
        told = [(one["change"], one["path"]) for one in service.ask("changes")["changes"]]
        assert ("removed", str(folder / "sub/inner")) not in told
        assert told.count(("unreadable", str(folder / "closed"))) == 1
        service.stop()


class TestWatching:
    def test_other_paths_keep_what_they_know(self, watching: Watch, tmp_path: Path) -> None:
        (watching.folder / "sub/inner").write_text("changed")
        watching.watch(watching.folder / "sub")
        assert [one["path"] for one in watching.fresh()] == [str(watching.folder / "sub/inner")]
        (watching.folder / "old").write_text("not watched any more")
        assert watching.fresh() == []
        watching.watch(watching.folder, watching.folder / "sub", tmp_path / "watched/sub/inner")
        assert watching.status()["watching"] == [str(watching.folder)]
        assert watching.fresh() == []  # new below the folder: the base again; old news below sub: none
        (watching.folder / "more").touch()
        assert watching.news() == [("added", "more")]

    def test_unwatch_forgets_the_files_and_keeps_the_numbers(self, watching: Watch) -> None:
        (watching.folder / "new").touch()
        assert watching.news() == [("added", "new")]
        status = watching.service.ask("unwatch")
        assert (status["files"], status["watching"], status["last"]) == (0, [], 1)
        watching.watch()
        assert watching.fresh() == []
        assert watching.service.ask("changes", since=0)["last"] == 1

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ({"do": "watch"}, "expected 1 to 64 absolute paths as 'paths', got None"),
            ({"do": "watch", "paths": []}, "expected 1 to 64 absolute paths"),
            ({"do": "watch", "paths": ["etc"]}, "expected an absolute path, got 'etc'"),
            ({"do": "watch", "paths": ["/etc/../x"]}, "without '..'"),
            ({"do": "watch", "paths": ["/a\0b"]}, "expected an absolute path"),
            ({"do": "watch", "paths": [7]}, "got 7"),
            ({"do": "watch", "paths": ["/x"] * 65}, "expected 1 to 64"),
            (
                {"do": "watch", "paths": ["/x"], "every_s": 0},
                "'every_s': expected a number from 1 to 86400, got 0",
            ),
            ({"do": "watch", "paths": ["/x"], "every_s": True}, "got True"),
            ({"do": "changes", "since": -1}, "'since': expected a number from 0"),
            ({"do": "changes", "since": 99}, "the last one has the number 0"),
            ({"do": "changes", "sinse": 1}, "got 'sinse'"),
            ({"do": "look"}, "expected one of watch, unwatch, status, changes"),
            ({"do": ["watch"]}, "expected one of watch"),
        ],
    )
    def test_wrong_questions_change_nothing(self, watch: Watch, args: dict[str, Any], words: str) -> None:
        before = watch.status()
        assert words in watch.service.refusal(args)
        assert watch.status() == before


class TestKept:
    @pytest.mark.parametrize("kill", [True, False])
    def test_what_happened_while_it_was_away_is_told(self, watching: Watch, kill: bool) -> None:
        (watching.folder / "new").touch()
        assert watching.news() == [("added", "new")]
        if kill:
            watching.service.kill()
        else:
            watching.service.stop()
        (watching.folder / "old").write_text("while it was away")
        (watching.folder / "new").unlink()
        watching.service = watching.module.start(watching.data)
        assert sorted(watching.news()) == [("changed", "old"), ("removed", "new")]
        assert watching.status()["every_s"] == 1.0

    def test_killed_at_any_moment_no_number_is_told_twice(self, watching: Watch) -> None:
        """Ten kills while files come and go: what was told stays, the numbers have no gaps."""
        told: dict[int, tuple[str, str]] = {}

        def ask() -> None:
            for one in watching.service.ask("changes", since=0, limit=300)["changes"]:
                what = (one["change"], one["path"])
                assert told.setdefault(one["n"], what) == what

        for number in range(10):
            for file in range(20):
                (watching.folder / f"f{number}-{file}").write_text(str(file))
            time.sleep(0.15 * (number % 4))
            ask()
            watching.restart(kill=True)
        watching.settle()
        ask()
        assert sorted(told) == list(range(1, len(told) + 1))
        added = [path for change, path in told.values() if change == "added"]
        assert len(added) == len(set(added)) == 200
        assert {change for change, _ in told.values()} <= {"added", "changed"}  # seen before it was written

    def test_a_state_that_cannot_be_read_is_set_aside(self, watching: Watch) -> None:
        watching.service.stop()
        (watching.data / "state.json").write_text('{"v": 1, "files"')
        watching.service = watching.module.start(watching.data)
        assert watching.status()["watching"] == []
        assert list(watching.data.glob("state.json.*"))


def test_ten_thousand_files(watch: Watch) -> None:
    """Seen, changed in part, and removed, with little memory and without hogging the processor."""
    for number in range(100):
        folder = watch.folder / f"d{number}"
        folder.mkdir()
        for file in range(100):
            (folder / f"f{file}").write_text(f"{number} {file}")
    watch.watch()
    pid = watch.service.child.pid
    began, cpu = time.monotonic(), cpu_s(pid)
    wait_for(lambda: watch.status()["settled"], "the first round", 240)
    share = (cpu_s(pid) - cpu) / (time.monotonic() - began)
    assert watch.status()["files"] == 4 + 100 * 101
    assert share < 0.5  # aimed at: 0.2, the questions not counted
    assert watch.service.ask("changes")["last"] == 0
    for number in range(100):
        (watch.folder / f"d{number}/f7").write_text("other")
    shutil.rmtree(watch.folder / "d99")
    watch.settle()
    reply = watch.service.ask("changes", since=0, limit=300)
    kinds = [one["change"] for one in reply["changes"]]
    assert (kinds.count("changed"), kinds.count("removed")) == (99, 101)
    assert rss(pid) < 96 << 20
    watch.restart(kill=True)
    watch.settle()
    assert watch.service.ask("changes")["last"] == 200


def test_more_files_than_it_can_watch(module: Module, tmp_path: Path) -> None:
    """The bound is a number in the module: a copy with a smaller one."""
    folder = tmp_path / "copy"
    shutil.copytree(module.folder, folder)
    source = folder / "integrity.py"
    source.write_text(source.read_text().replace("MOST_FILES = 20_000", "MOST_FILES = 50"))
    watched = tmp_path / "watched"
    watched.mkdir()
    for number in range(120):
        (watched / f"f{number}").touch()
    small = Watch(Module(module.runner, folder, module.manifest), tmp_path / "data", watched)
    small.watch()
    small.settle()
    status = small.status()
    assert (status["files"], status["most_files"], status["full"]) == (50, 50, True)
    assert small.settle()["files"] == 50
    assert [one["change"] for one in small.service.ask("changes")["changes"]] in ([], ["full"])
    for number in range(120):
        (watched / f"f{number}").unlink()
    small.settle()
    assert small.settle()["full"] is False
    assert small.status()["files"] == 1
    assert len(json.dumps(small.service.ask("changes", since=0, limit=300))) < 200_000
    small.service.stop()


def test_long_names_fit_in_replies_and_in_the_state(watching: Watch) -> None:
    """Two hundred paths of 3,000 bytes that are no UTF-8, each spelled with 12,000 characters."""
    deep = os.fsencode(watching.folder)
    here = os.open(deep, os.O_RDONLY)
    try:
        for _ in range(12):
            os.mkdir(b"\xff" * 250, dir_fd=here)
            inner = os.open(b"\xff" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
        for number in range(200):
            os.close(os.open(b"%d" % number, os.O_CREAT | os.O_WRONLY, dir_fd=here))
    finally:
        os.close(here)
    assert watching.settle()["files"] == 4 + 12 + 200
    since, seen = 0, []
    while True:
        reply = watching.service.ask("changes", since=since, limit=300)
        seen += [one["n"] for one in reply["changes"]]
        assert reply["lost"] == 0
        if not reply["more"]:
            break
        since = seen[-1]
    assert seen == list(range(1, 213))
    watching.restart(kill=True)
    watching.settle()
    assert watching.status()["last"] == 212
    shutil.rmtree(watching.folder / os.fsdecode(b"\xff" * 250))
    watching.settle()
    reply = watching.service.ask("changes", since=0)
    assert reply["last"] == 424
    assert reply["lost"] > 0  # the bytes of all changes have a bound
    assert (watching.data / "state.json").stat().st_size < 8 << 20


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
