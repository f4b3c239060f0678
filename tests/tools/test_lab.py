"""The lab's own parts: what it sees of processes, its load generator's frames, its figures."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from wsproto import ConnectionType, WSConnection, events

from bench import report
from bench.figures import Figure, number
from instar.core.errors import MachineError, ServerUnreachable
from instar_lab import machine, main, modules
from instar_lab.container.box import first_inside
from instar_lab.demo.script import GOOD, STEPS
from instar_lab.node import Node
from instar_lab.program.variants import VARIANTS
from instar_lab.sim import frames
from instar_server.ca import FleetCA


def test_a_dead_child_of_nspawn_is_not_taken_for_the_container() -> None:
    with subprocess.Popen(["sh", "-c", "true & exec sleep 60"]) as parent:
        try:
            status = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")

            def dead() -> bool:
                found = status.read_text().split()
                return bool(found) and machine.command_line(int(found[0])) == ()

            machine.wait_for(dead, "a dead child", 60.0, every_s=0.01)
            assert first_inside(parent.pid) == 0
        finally:
            parent.kill()


class TestMachine:
    @pytest.mark.parametrize(
        ("words", "ours"),
        [
            (("python", "-I", "-S", "/f/n1/agent/releases/1-a/instar.pyz", "agent"), True),
            (("python", "-m", "instar_server.main", "run", "--data", "/f/server/data"), True),
            (("python", "/elsewhere/instar.pyz", "status", "--state", "/f"), True),
            (("less", "/f/n1/run/agent.log"), False),
            (("timeout", "9", "instar-lab", "demo", "--keep", "/f"), False),
            (("python", "/fleet/instar.pyz", "keep", "--state", "/fleet/n1"), False),
        ],
    )
    def test_only_instars_processes_below_a_folder_are_ours(self, words: tuple[str, ...], ours: bool) -> None:
        assert machine.works_below(words, "/f") is ours

    def test_ends_what_ignores_term_and_nothing_else(self, tmp_path: Path) -> None:
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
        stubborn, stranger = (
            subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE)
            for words in (["--state", str(tmp_path / "n1")], ["--state", f"{tmp_path}-other"])
        )
        try:
            for process in (stubborn, stranger):
                assert process.stdout is not None
                process.stdout.readline()
            assert machine.end_all_naming(tmp_path, grace_s=0.3) == 1
            assert stubborn.wait(60) == -9
            assert stranger.poll() is None
        finally:
            for process in (stubborn, stranger):
                process.kill()
                process.communicate()

    def test_a_role_is_played_twice_only_when_both_processes_stay(self) -> None:
        """A child that has not executed its own program yet is seen with its parent's command line."""
        node = Node(Path(tempfile.mkdtemp(prefix="il-", dir="/tmp")))
        code = "import os, sys, time; child = os.fork(); print(flush=True); child or sys.stdin.read(); time.sleep(60 * bool(child))"
        for stays in (False, True):
            words = [str(node.state / "instar.pyz"), "updater", "--state", str(node.state)]
            parent = subprocess.Popen(
                [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert parent.stdin is not None
            assert parent.stdout is not None
            try:
                parent.stdout.readline()
                assert len(node.running()) == 2
                assert node.pid("updater") == parent.pid
                if not stays:
                    threading.Timer(0.3, parent.stdin.close).start()
                with (
                    pytest.raises(MachineError, match="two processes as updater") if stays else nullcontext()
                ):
                    assert node.digests() == {"updater": ""}
            finally:
                assert node.end(grace_s=0.1) >= 1
                parent.stdin.close()
                parent.stdout.close()
                parent.wait(60)
        node.state.rmdir()

    def test_a_free_port_is_none_that_the_kernel_gives_away(self) -> None:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        with socket.create_server(("127.0.0.1", machine.free_port())) as listener:
            assert 1024 < listener.getsockname()[1] < lowest

    def test_waiting_is_bounded_and_says_what_there_is(self) -> None:
        began = time.monotonic()
        with pytest.raises(MachineError, match=r"expected rain within 0.2 s, got sun"):
            machine.wait_for(lambda: False, "rain", 0.2, lambda: "sun", every_s=0.01)
        assert time.monotonic() - began < 30

    def test_tail_of_a_log(self, tmp_path: Path) -> None:
        log = tmp_path / "a.log"
        assert "cannot read a.log" in machine.tail(log)
        log.write_text("\n".join(map(str, range(9999))))
        assert machine.tail(log, 2) == "9997\n9998"


class TestFrames:
    """The light client against a full implementation of the protocol."""

    def test_upgrade_and_texts_of_all_sizes(self) -> None:
        server = WSConnection(ConnectionType.SERVER)
        server.receive_data(frames.upgrade("h:1", "/v1/channel", b"k" * 16, {"Instar-Program": "agent 1 x"}))
        (request,) = server.events()
        assert isinstance(request, events.Request)
        assert (b"instar-program", b"agent 1 x") in request.extra_headers
        server.send(events.AcceptConnection())
        for size in (0, 1, 125, 126, 65_535, 65_536):
            server.receive_data(frames.frame(frames.TEXT, b"a" * size))
            text = "".join(event.data for event in server.events() if isinstance(event, events.TextMessage))
            assert len(text) == size

    @pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536])
    @pytest.mark.parametrize("piece", [1, 7, 70_000])
    def test_reads_what_a_server_sends_in_any_pieces(self, size: int, piece: int) -> None:
        if size > 1000 and piece == 1:
            pytest.skip("no more is learned byte by byte")
        server = WSConnection(ConnectionType.SERVER)
        server.receive_data(frames.upgrade("h", "/", b"k" * 16, {}))
        list(server.events())
        server.send(events.AcceptConnection())
        sent = server.send(events.TextMessage("b" * size)) + server.send(events.Ping(b"!"))
        reader, found = frames.FrameReader(), []
        for start in range(0, len(sent), piece):
            found += reader.feed(sent[start : start + piece])
        assert found == [(frames.TEXT, b"b" * size), (frames.PING, b"!")]


class TestFigures:
    FIGURE = Figure("gap", "ms", (100.0, 150.0, 300.0), 200.0, {"Other": 300.0})

    def test_the_median_counts(self) -> None:
        assert (self.FIGURE.value, self.FIGURE.met) == (150.0, True)
        assert self.FIGURE.ratios() == "Other 300 (2.0×)"
        assert Figure("gap", "ms", (201.0,), 200.0).met is False
        assert Figure("gap", "ms", (201.0,)).met is None

    @pytest.mark.parametrize(
        ("value", "shown"), [(0.0, "0"), (0.456, "0.46"), (12.34, "12.3"), (1234.5, "1,234")]
    )
    def test_numbers(self, value: float, shown: str) -> None:
        assert number(value) == shown

    def test_the_document(self) -> None:
        text = report.markdown([self.FIGURE], datetime.date(2026, 1, 2))
        assert "| gap | 150 ms | 100–300 (3) | < 200 ms | Other 300 (2.0×) | yes |" in text
        assert "2026-01-02" in text


class TestCommands:
    def test_the_script_shows_every_way_of_being_bad(self) -> None:
        bad = [step for step in STEPS if not step.moves]
        assert len(bad) == 5
        assert {step.variant for step in bad} == set(VARIANTS) - {"killed-at"} | {""}
        assert [step.version for step in STEPS if step.moves][-1] == GOOD

    @pytest.mark.parametrize(
        "words", [[], ["demo", "--nodes", "0"], ["demo", "--nodes", "x"], ["sim"], ["modules"], ["fly"]]
    )
    def test_wrong_words_are_told(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main.main(words)
        assert ended.value.code == 2
        assert "usage: instar-lab" in capsys.readouterr().err

    @pytest.mark.parametrize("command", ["demo", "sim", "build", "modules"])
    def test_help_teaches_by_example(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main.main([command, "--help"])
        assert ended.value.code == 0
        assert len(capsys.readouterr().out) > 400

    def test_an_unknown_variant_is_an_error_in_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["build", "--version", "1.0.0", "--out", str(tmp_path / "x"), "--variant", "perfect"]
        assert main.main(words) == 2
        assert "expected one of does-not-start" in capsys.readouterr().err


class TestRefusals:
    """What this machine or a server cannot do is told in one line, with what to do about it."""

    def told(self, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
        """Exit status, and the one line."""
        before = signal.getsignal(signal.SIGTERM)
        try:
            status = main.main([*words])
        finally:
            signal.signal(signal.SIGTERM, before)
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1, said
        assert said.startswith("instar-lab: cannot "), said
        return status, said

    @pytest.fixture
    def ca(self, tmp_path: Path) -> str:
        FleetCA.create(tmp_path / "ca", time.time())
        return str(tmp_path / "ca" / "ca.pem")

    def sim(self, server: str, ca: str) -> list[str]:
        return ["sim", "--server", server, "--ca", ca, "--token", "t", "--agents", "50", "--seconds", "1"]

    def test_no_server_there(self, ca: str, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.socket() as deaf:  # nobody else may listen here
            deaf.bind(("127.0.0.1", 0))
            place = f"https://127.0.0.1:{deaf.getsockname()[1]}"
            status, said = self.told(capsys, *self.sim(place, ca))
        assert status == ServerUnreachable.exit_status
        assert place in said
        assert "is the server running" in said

    def test_something_else_answers_there(self, ca: str, capsys: pytest.CaptureFixture[str]) -> None:
        """It hangs up at once: no TLS, and no error of the system."""
        with socket.create_server(("127.0.0.1", 0)) as other:

            def hang_up() -> None:
                with suppress(OSError):
                    while True:
                        other.accept()[0].close()

            threading.Thread(target=hang_up, daemon=True).start()
            status, _ = self.told(capsys, *self.sim(f"https://127.0.0.1:{other.getsockname()[1]}", ca))
            other.shutdown(socket.SHUT_RDWR)
        assert status == ServerUnreachable.exit_status

    @pytest.mark.parametrize("server", ["https://127.0.0.1:99999", "https://[::1:8443", "http://h:1", "h"])
    def test_an_address_that_is_none(self, server: str, ca: str, capsys: pytest.CaptureFixture[str]) -> None:
        status, said = self.told(capsys, *self.sim(server, ca))
        assert status == 2
        assert "expected https://host:port" in said

    def test_a_ca_file_that_holds_no_certificate(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "root.json").write_text("{}")
        status, said = self.told(capsys, *self.sim("https://127.0.0.1:9", str(tmp_path / "root.json")))
        assert status == 2
        assert "root.json" in said
        assert "ca/ca.pem" in said

    def test_a_place_where_nothing_can_be_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").touch()
        status, said = self.told(capsys, "build", "--version", "1.0.0", "--out", "/proc/x/q.pyz")
        assert status == MachineError.exit_status
        assert "cannot write /proc/x/q.pyz" in said
        assert "--out" in said
        folder = str(tmp_path / "file" / "out")
        status, said = self.told(capsys, "modules", str(modules.OURS / "inventory"), "--out", folder)
        assert status == MachineError.exit_status
        assert folder in said

    def test_a_full_folder_is_not_kept_in(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for place in (tmp_path / "full", tmp_path / "full" / "file"):
            (tmp_path / "full").mkdir(exist_ok=True)
            (tmp_path / "full" / "file").touch()
            status, said = self.told(capsys, "demo", "--nodes", "1", "--keep", str(place))
            assert (status, str(place) in said) == (2, True)
            assert "expected a new or empty folder" in said
        assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


class TestModules:
    """`make modules`, with no compiler but those that are put into `tools`."""

    @pytest.fixture
    def tools(self, tmp_path: Path) -> Path:
        (tmp_path / "tools").mkdir()
        return tmp_path / "tools"

    def packed(self, tools: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
        """How it ended for all of ours, and the archives that it made."""
        out = tools.parent / "out"
        line = [sys.executable, "-m", "instar_lab.main", "modules", *sorted(map(str, modules.OURS.iterdir()))]
        environment = os.environ | {"PATH": str(tools), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [*line, "--out", str(out), *words],
            capture_output=True, text=True, timeout=300, check=False, env=environment,
        )  # fmt: skip
        return done, {path.name.removesuffix("-1.0.0.tar.gz") for path in out.iterdir()}

    def test_what_no_compiler_is_there_for_is_passed_over(self, tools: Path) -> None:
        done, made = self.packed(tools)
        assert done.returncode == MachineError.exit_status
        assert made == {"file.integrity", "interfaces.list", "inventory", "service.status"}
        said = done.stderr.splitlines()
        assert [line.split(":")[1].strip() for line in said] == [
            "passed over disk.usage",
            "passed over packages.list",
        ]
        assert "cc is not installed (Debian: apt-get install gcc libc6-dev)" in said[0]
        assert "clang is not installed (Debian: apt-get install clang lld)" in said[1]
        skipped, again = self.packed(tools, "--skip-missing")
        assert (skipped.returncode, again) == (0, made)
        assert "passed over" in skipped.stderr

    def test_clang_without_its_linker_is_as_good_as_none(self, tools: Path) -> None:
        clang = tools / "clang"
        clang.write_text("#!/bin/sh\necho wasm-ld\n")
        clang.chmod(0o755)
        done, _ = self.packed(tools)
        assert "wasm-ld is not installed (Debian: apt-get install clang lld)" in done.stderr

    def test_a_compiler_that_says_no_is_an_error(self, tools: Path) -> None:
        compiler = tools / "cc"
        compiler.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 1\n")
        compiler.chmod(0o755)
        done, _ = self.packed(tools, "--skip-missing")
        assert done.returncode == 2
        assert done.stderr.strip() == "instar-lab: cannot build disk.so: cc: no such thing"
