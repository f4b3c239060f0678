"""`instar-lab update-test` as a process of its own (M6): what it says, what it leaves, and how it ends."""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.trust.program import program_digest
from instar_lab import machine, main
from instar_lab.program import build, variants
from instar_lab.updatetest.options import MODES

pytestmark = pytest.mark.xdist_group("update-test")

WITHIN_S = 400.0
GONE_WITHIN_S = 120.0
SOAK = 200


def words(*options: str) -> list[str]:
    return [sys.executable, "-m", "instar_lab.main", "update-test", "--timeout", "300", *options]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class Told:
    """What a run with --json said, and how it ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.err = status, err
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]

    def all(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    def one(self, event: str) -> dict[str, Any]:
        (found,) = self.all(event)
        return found

    def check_gone(self) -> None:
        """Nothing that it had is left, and it said so last."""
        assert self.lines[-1] == {"event": "uninstalled", "whole": True, "fault": ""}, self.err
        folder = Path(self.one("installing")["state"]).parent
        assert not folder.exists()
        assert machine.naming(folder) == []


def run(*options: str, within_s: float = WITHIN_S) -> Told:
    done = subprocess.run(
        words("--json", *options),
        capture_output=True, text=True, timeout=within_s, check=False, env=environment(),
    )  # fmt: skip
    return Told(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ie-ut-", dir="/tmp") as made:
        yield Path(made)


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """Another build than that of the tree."""
    path = folder / "other.pyz"
    build.write(build.build("2.3.4", built="2026-01-02T03:04:05+01:00"), path)
    return path


@pytest.fixture(scope="module")
def bad(folder: Path) -> Path:
    path = folder / "bad.pyz"
    build.write(variants.variant("does-not-start", "1.0.9"), path)
    return path


class TestRuns:
    @pytest.mark.parametrize("mode", MODES)
    def test_three_updates_in_each_mode(self, mode: str) -> None:
        told = run("--mode", mode, "--count", "3", "--min-delay", "5", "--max-delay", "40")
        assert told.status == 0, told.err
        told.check_gone()
        hello, done, summary = told.one("connected"), told.all("done"), told.one("summary")
        assert (hello["os"], hello["arch"]) == ("linux", platform.machine())
        assert hello["python"] == platform.python_version()
        assert hello["digest"] == told.one("installing")["digest"]
        datetime.datetime.fromisoformat(hello["built"])
        digests = [hello["digest"], *(line["to"]["digest"] for line in done)]
        assert len(set(digests)) == 4, "the bytes must travel each time"
        assert [line["from"]["digest"] for line in done] == digests[:-1]
        for line in done:
            assert line["reported"] == line["to"]["digest"]
            assert 5 <= line["delay_ms"] <= 40
            assert line["bytes"] > 500_000
            assert 0 < line["gap_s"] < line["confirmed_s"]
            assert 0 < line["gone_s"] <= line["back_s"] < line["confirmed_s"]
        assert (summary["cycles"], summary["wanted"], summary["why"]) == (3, 3, "")
        assert summary["seconds"]["median"] <= summary["seconds"]["worst"]
        assert summary["bytes"] == sum(line["bytes"] for line in done)
        if mode == "recovery":
            assert all(line["core"] for line in done)
            shown = {line["cycle"] for line in told.all("progress") if line["percent"] == 100.0}
            assert shown == {1, 2, 3}

    @pytest.mark.slow
    def test_the_updater_and_then_the_agent(self) -> None:
        told = run("--line", "both", "--count", "2")
        assert told.status == 0, told.err
        told.check_gone()
        for line in told.all("done"):
            assert line["steps"]["updater confirmed"] <= line["steps"]["agent offered"]

    @pytest.mark.slow
    def test_the_updater_alone_does_not_cost_the_agents_channel(self) -> None:
        told = run("--line", "updater", "--count", "2")
        assert told.status == 0, told.err
        assert told.all("disconnected") == []
        assert all(line["gap_s"] > 0 for line in told.all("done"))

    def test_from_one_file_to_another_and_back(self, other: Path) -> None:
        """Also to a lower version; and what is on the disk still is not fetched again."""
        told = run("--program", str(other), "--alternate", str(self.lower(other)), "--count", "4")
        assert told.status == 0, told.err
        told.check_gone()
        assert told.one("connected")["built"] == "2026-01-02T02:04:05Z"
        done = told.all("done")
        assert [line["to"]["version"] for line in done] == ["1.9.0", "2.3.4", "1.9.0", "2.3.4"]
        assert [line["to"]["source"] for line in done] == ["lower.pyz", "other.pyz"] * 2
        assert [line["bytes"] > 0 for line in done] == [True, False, False, False]

    def lower(self, other: Path) -> Path:
        path = other.with_name("lower.pyz")
        build.write(build.build("1.9.0"), path)
        return path

    def test_what_people_are_told(self, other: Path, folder: Path) -> None:
        keep = folder / "keep"
        options = ["--program", str(other), "--count", "1", "--keep", str(keep)]
        done = subprocess.run(
            words(*options), capture_output=True, text=True, timeout=WITHIN_S, check=False, env=environment()
        )
        assert done.returncode == 0, done.stderr
        assert f"hash {program_digest(other.read_bytes())[:12]}" in done.stdout
        assert "connected: version 2.3.4, built 2026-01-02T02:04:05Z, linux" in done.stdout
        assert re.search(
            r"^\[1\] after \d+ ms: pull update to 2\.3\.5 [0-9a-f]{12} \(other\.pyz, as 2\.3\.5\)",
            done.stdout,
            re.MULTILINE,
        )
        for words_ in (
            "disconnected",
            "back with",
            "confirmed, hash",
            "1 of 1 updates",
            "median",
            "nothing is left",
        ):
            assert words_ in done.stdout
        assert (keep / "words/run/agent.log").stat().st_size > 0
        assert list((keep / "words/journal").glob("*.journal"))
        assert not (keep / "node").exists()


class TestEnds:
    def begun(self, options: list[str], until: str) -> tuple[subprocess.Popen[str], str]:
        """The tool, once it has told of `until`; and what it said."""
        process = subprocess.Popen(
            words("--json", *options),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        said, deadline = "", time.monotonic() + WITHIN_S
        for line in process.stdout:
            said += line
            if json.loads(line)["event"] == until:
                return process, said
            assert time.monotonic() < deadline, said
        raise AssertionError(f"no {until}: {said}{process.stderr.read() if process.stderr else ''}")

    def ended(self, process: subprocess.Popen[str], said: str) -> Told:
        out, err = process.communicate(timeout=GONE_WITHIN_S)
        return Told(process.returncode, said + out, err)

    @pytest.mark.parametrize(
        ("number", "until"),
        [(signal.SIGINT, "disconnected"), (signal.SIGTERM, "ordered"), (signal.SIGHUP, "installing")],
    )
    def test_interrupted_in_the_middle(self, number: int, until: str) -> None:
        process, said = self.begun(["--count", "50"], until)
        os.killpg(process.pid, number)  # as a terminal does, to all of its processes
        time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(number)  # a person who cannot wait
        told = self.ended(process, said)
        assert told.status == 130, told.err
        assert "interrupted" in told.err
        assert told.one("summary")["why"] == "interrupted"
        told.check_gone()

    def test_interrupted_while_a_recovery_core_works(self) -> None:
        """The uninstall ends the core, too: it would start the roles again."""
        process, said = self.begun(["--count", "50", "--mode", "recovery"], "core")
        assert process.stdout is not None
        while '"what": "start"' not in said:
            said += process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        told = self.ended(process, said)
        assert told.status == 130, told.err
        told.check_gone()

    def test_without_an_end_an_interruption_is_the_end(self) -> None:
        process, said = self.begun(["--count", "0"], "done")
        process.send_signal(signal.SIGINT)
        told = self.ended(process, said)
        assert told.status == 0, told.err
        assert told.one("summary")["cycles"] >= 1
        told.check_gone()

    def test_a_build_that_does_not_start_is_named(self, bad: Path) -> None:
        told = run("--alternate", str(bad), "--count", "3")
        assert told.status == 7, told.err
        failed = told.one("failed")
        assert failed["code"] == "reverted"
        assert "agent 1.0.9" in failed["text"]
        assert "No module named 'instar.needed'" in failed["text"]
        assert told.one("summary")["cycles"] == 0
        assert told.err.splitlines()[-1].endswith("(reverted)")
        told.check_gone()

    @pytest.mark.slow
    def test_what_the_machine_refuses_is_a_failure_like_any_other(self) -> None:
        process, said = self.begun(["--count", "3"], "done")
        folder = Path(json.loads(said.splitlines()[0])["state"]).parent
        shutil.rmtree(folder / "server")
        told = self.ended(process, said)
        assert told.status == 4, told.err
        assert (told.one("failed")["code"], told.one("summary")["why"]) == ("machine", "machine")
        assert "No such file or directory" in told.err.splitlines()[-1]
        told.check_gone()

    @pytest.mark.slow
    def test_what_only_the_test_itself_could_end_is_told(self) -> None:
        process, said = self.begun(["--count", "1"], "ordered")
        state = Path(json.loads(said.splitlines()[0])["state"])
        (state / "launcher/instar.pyz").unlink()
        told = self.ended(process, said)
        assert told.status == 1, told.err
        fault = told.one("uninstalled")["fault"]
        assert re.fullmatch(r"expected the uninstall to leave nothing, got \d+ of its processes", fault)
        assert machine.naming(state.parent) == []
        assert not state.parent.exists()

    @pytest.mark.slow
    def test_an_update_that_takes_too_long_is_told_with_how_far_it_came(self) -> None:
        told = run("--count", "1", "--hold", "8.9", "--timeout", "9")
        assert told.status != 0
        failed = told.one("failed")
        assert failed["code"] == "too-late"
        assert "within 9 s, got 'agent trial'" in failed["text"]
        told.check_gone()


def unreadable(how: str, program: bytes) -> bytes:
    """`program` with one altered byte in a licence, or with its version file encrypted or badly compressed."""
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    if how == "damaged":
        licence = next(data for name, data in files.items() if name.startswith("licences/"))
        return program.replace(licence, licence[:-1] + b"?")
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        entry = archive.getinfo("instar/version.py")
        entry.flag_bits |= 1 if how == "encrypted" else 0
    whole, start = bytearray(made.getvalue()), entry.header_offset + 30 + len(entry.filename)
    if how == "compressed":
        whole[start : start + 4] = b"\xff\xff\xff\xff"
    return bytes(whole)


class TestParameters:
    """What is wrong is said in a line, and nothing is started."""

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--count", "-1"], "expected --count as a whole number"),
            (["--count", "many"], "expected --count as a whole number"),
            (["--min-delay", "x"], "expected --min-delay as a number"),
            (["--max-delay", "-5"], "expected --max-delay as a number"),
            (["--max-delay", "nan"], "expected --max-delay as a number"),
            (["--min-delay", "200"], "expected --min-delay <= --max-delay, got 200 and 100"),
            (["--mode", "pigeon"], "expected --mode pull, native or recovery, got 'pigeon'"),
            (["--line", "tail"], "expected --line agent, updater or both, got 'tail'"),
            (["--hold", "-0.1"], "expected --hold as a number"),
            (["--hold", "60"], "expected --hold < --timeout"),
            (["--timeout", "0"], "expected --timeout as a number"),
            (["--program", "/no/such/file"], "cannot read /no/such/file: No such file"),
            (["--alternate", __file__], "it is no program of Instar"),
            (["--program", ""], "expected --program as a file, got ''"),
            (["--alternate", ""], "expected --alternate as a file, got ''"),
            (["--keep", ""], "expected --keep as a folder, got ''"),
            (["--keep", "/usr"], "expected --keep to be new or empty"),
            (["--keep", "/tmp/" + "x" * 80], "expected --keep in at most"),
        ],
    )
    def test_wrong_ones(self, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main.main(["update-test", *options]) == 2
        out, err = capsys.readouterr()
        assert said in err
        assert (len(err.splitlines()), out) == (1, "")

    def test_all_that_is_wrong_is_said_at_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main.main(["update-test", "--count", "x", "--mode", "y", "--program", "/z"]) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in ("--count", "--mode", "/z"))

    @pytest.mark.parametrize("how", ["compressed", "encrypted", "damaged"])
    def test_a_program_that_cannot_be_read(
        self, how: str, other: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Also where what is wrong is in a file that only a later update reads."""
        path = folder / f"{how}.pyz"
        path.write_bytes(unreadable(how, other.read_bytes()))
        assert main.main(["update-test", "--program", str(path)]) == 2
        out, err = capsys.readouterr()
        assert f"cannot use {path}: it is no program of Instar" in err
        assert (len(err.splitlines()), out) == (1, "")

    def test_two_builds_that_cannot_alternate(
        self, other: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main.main(["update-test", "--program", str(other), "--alternate", str(other)]) == 2
        assert "expected two different builds" in capsys.readouterr().err
        same = folder / "same.pyz"
        build.write(build.build("2.3.4", built=""), same)
        assert main.main(["update-test", "--program", str(other), "--alternate", str(same)]) == 2
        assert "both are 2.3.4" in capsys.readouterr().err

    def test_help_teaches_with_examples(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main.main(["update-test", "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.count("  instar-lab update-test") >= 5


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alternating", [True, False], ids=["alternating", "fresh"])
def test_two_hundred_in_a_row(mode: str, alternating: bool, other: Path) -> None:
    builds = ["--alternate", str(other)] if alternating else []
    told = run("--mode", mode, "--count", str(SOAK), *builds, within_s=SOAK * 10.0)
    assert told.status == 0, told.err
    told.check_gone()
    assert all(line["reported"] == line["to"]["digest"] for line in told.all("done"))
    summary = told.one("summary")
    assert summary["cycles"] == SOAK
    print(mode, alternating, summary)  # how long a cycle takes is measured by `make bench`
