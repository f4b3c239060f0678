"""The probe after a switch (D6): its tries, what it tells, and that it neither slows nor weakens a trial."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instar.core.journal import Progress, Reason, timeline
from instar.core.releases import Release
from instar.core.settings import ProbeSettings, Settings, TrialSettings
from instar.engine.driver import drive
from instar.host import captured, points, trials
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.records import read_quarantine
from instar.targets.agent_release import AgentRelease
from instar.targets.kit import Kit, Verdict
from instar.targets.probe import Probe, probe_now
from tests.node.world import Node, Quiet, build

RELEASE = Release("1.1.0", "ab" * 48)
RIGHT = {"version": "1.1.0", "digest": "ab" * 48, "pid": 7, "connected": True, "modules": {}}
THREE = ProbeSettings(tries=3, every_s=1.0)


# --- one probe


def test_the_wanted_version_passes_at_once() -> None:
    probe = Probe(RELEASE, THREE)
    probe.heard(RIGHT, 100.0)
    assert (probe.passed, probe.failed, probe.tries) == (True, False, 1)
    assert probe.told() == {
        "release": RELEASE.name, "ok": True, "tries": 1, "why": "",
        "said": {"version": "1.1.0", "digest": "ab" * 48, "pid": 7, "connected": True},
    }  # fmt: skip
    probe.silent("gone", 200.0)
    assert probe.passed, "later silence is for the trial"


@pytest.mark.parametrize(
    "wrong", [{"version": "1.0.0"}, {"digest": "cd" * 48}, {"version": None}, {"digest": ["x"]}]
)
def test_another_version_or_digest_does_not_pass(wrong: dict[str, Any]) -> None:
    probe = Probe(RELEASE, ProbeSettings(tries=1, every_s=1.0))
    probe.heard({**RIGHT, **wrong}, 0.0)
    probe.heard({**RIGHT, **wrong}, 1.0)
    assert probe.failed
    assert "it says that it is" in probe.words()
    json.dumps(probe.told())


def test_quick_questions_between_two_tries_do_not_count() -> None:
    probe = Probe(RELEASE, THREE)
    for tenth in range(30):
        probe.silent("no answer", tenth / 10)
        assert not probe.failed
    assert probe.tries == 3
    probe.silent("no answer", 3.0)
    assert probe.failed
    assert probe.words() == "1.1.0 did not answer as it should within 3 tries: no answer"
    probe.heard(RIGHT, 3.1)
    assert probe.passed, "the last word counts until somebody has acted on it"


def test_a_machine_that_slept_has_used_up_one_try() -> None:
    probe = Probe(RELEASE, THREE)
    probe.silent("no answer", 0.0)
    probe.silent("no answer", 50_000.0)
    assert (probe.tries, probe.failed) == (2, False)


def test_what_was_put_back_is_not_asked_for_ever(node: Node) -> None:
    kit = replace(node.kit(), settings=Settings(probe=ProbeSettings(tries=1000, every_s=60.0)))
    began = node.clock.now
    probe = probe_now(kit, RELEASE, lambda: {"version": "0.9.0"})
    assert not probe.passed
    assert node.clock.now - began < 31.0


# --- in a transaction


def target(node: Node, lease_s: float = 100.0) -> AgentRelease:
    kit = node.kit()
    trial = TrialSettings(hold_s=0.05, lease_s=lease_s, cap_s=1000.0)
    return AgentRelease(replace(kit, settings=replace(kit.settings, trial=trial)))


def update(node: Node, lease_s: float = 100.0) -> Progress:
    node.boot()
    return drive(node.begin(), target(node, lease_s), Quiet())


def silent_on_new(node: Node) -> None:
    healthy = node.said
    node.said = lambda: None if node.machine.running.get("agent") == node.new.name else healthy()


def said_at_the_switch(node: Node, words: str) -> Progress:
    """An update whose new release says something when it is started."""

    def say(point: str) -> None:
        if point == "activate:flipped":
            (node.layout.run / "agent.log").write_text(words)

    points.listener = say
    try:
        return update(node)
    finally:
        points.listener = None


def test_a_good_release_tells_its_probe_and_is_not_slower(node: Node) -> None:
    began = node.clock.now
    end = update(node)
    assert end.state.value == "confirmed"
    candidate = end.data["probes"]["candidate"]
    assert (candidate["ok"], candidate["tries"]) == (True, 1)
    assert candidate["said"]["version"] == "1.1.0"
    assert "output" not in candidate
    assert node.clock.now - began < 0.2, "the hold alone is waited for"


def test_a_release_that_stays_silent_goes_back_after_its_tries(node: Node) -> None:
    silent_on_new(node)
    log = node.layout.run / "agent.log"
    log.write_text("words from before\n")

    def say(point: str) -> None:
        if point == "activate:flipped":
            with log.open("a") as file:
                file.write("it cannot start: no such thing\n")
        if point == "revert:flipped":
            with log.open("a") as file:
                file.write("the old one is up\n")

    began = node.clock.now
    points.listener = say
    try:
        end = update(node)
    finally:
        points.listener = None
    assert end.reason is not None
    assert (end.state.value, end.reason.code) == ("reverted", "probe-failed")
    assert 9.0 < node.clock.now - began < 15.0, "long before the lease is over"
    probes = end.data["probes"]
    assert (probes["candidate"]["ok"], probes["candidate"]["tries"]) == (False, 10)
    assert "closed the connection" in probes["candidate"]["why"]
    assert probes["candidate"]["output"] == "it cannot start: no such thing"
    assert probes["restored"]["ok"] is True
    assert probes["restored"]["release"] == node.old.name
    assert node.line.current() == node.old.name
    assert len(read_quarantine(node.layout.quarantine)) == 1


def test_the_reported_reason_tells_both_in_short(node: Node) -> None:
    silent_on_new(node)
    (node.layout.run / "agent.log").write_text("")
    said_at_the_switch(node, "Traceback\nboom\n")
    (journal,) = node.journals.read_all()
    last = timeline(journal.records)[-1]
    assert last.state.value == "reverted"
    assert last.reason is not None
    assert last.reason.code == "probe-failed"
    for words in ("10 tries", "'boom'", f"{node.old.name} answers again"):
        assert words in last.reason.text, last.reason.text


def test_that_what_was_put_back_is_silent_too_is_told(node: Node) -> None:
    node.boot()
    node.said = lambda: None
    end = drive(node.begin(), target(node), Quiet())
    assert end.state.value == "reverted"
    restored = end.data["probes"]["restored"]
    assert (restored["ok"], restored["tries"]) == (False, 10)
    assert node.line.current() == node.old.name


def test_who_answers_as_another_version_goes_back(node: Node) -> None:
    healthy = node.said
    node.said = lambda: {**(healthy() or {}), "version": "9.9.9"}  # type: ignore[dict-item]
    end = update(node)
    assert end.reason is not None
    assert end.reason.code == "probe-failed"
    assert "9.9.9" in end.reason.text


def test_the_lease_still_holds_for_who_answers_but_is_not_well(node: Node) -> None:
    node.server.verdicts["trial"] = Verdict("wait", Reason("", ""))
    end = update(node, lease_s=30.0)
    assert end.reason is not None
    assert end.reason.code == "lease-lapsed"
    assert end.data["probes"]["candidate"]["ok"] is True


def test_the_servers_no_comes_first(node: Node) -> None:
    node.server.verdicts["trial"] = Verdict("fail", Reason("wrong-reply", "it"))
    end = update(node)
    assert end.reason is not None
    assert end.reason.code == "wrong-reply"


def test_a_trial_that_the_launcher_ended_is_told_with_its_output(node: Node) -> None:
    node.crashing.add(node.new.name)
    (node.layout.run / "agent.log").write_text("")
    end = said_at_the_switch(node, "crash\n")
    assert end.reason is not None
    assert end.reason.code == "attempts-used-up"
    assert end.data["probes"]["candidate"]["output"] == "crash"
    assert end.data["probes"]["restored"]["ok"] is True


def test_what_was_never_activated_is_not_probed(node: Node) -> None:
    node.server.verdicts["rehearsal"] = Verdict("fail", Reason("wrong-reply", "it"))
    end = update(node)
    assert end.state.value == "reverted"
    assert "probes" not in end.data


def test_a_probe_begins_anew_after_a_kill_and_never_leaves_a_trial(node: Node) -> None:
    silent_on_new(node)
    journal = node.begin()
    node.boot()
    looks = 0

    class Kill(BaseException):
        pass

    def cut() -> None:
        nonlocal looks
        node.machine.look_after()
        looks += node.machine.running["agent"] == node.new.name
        if looks == 50:
            raise Kill

    node.clock.on_sleep = cut
    with pytest.raises(Kill):
        drive(journal, target(node), Quiet())
    end = drive(node.journals.unfinished()[0], target(node), Quiet())
    assert end.state.value == "reverted"
    assert trials.read(node.line) is None


# --- a release that is put there anew, and the record of its trial


def test_a_process_from_before_the_trial_is_not_the_one_on_trial(node: Node) -> None:
    node.boot()
    node.record("agent", node.old.name)
    node.server.offered, node.server.served.data = node.old, node.old.archive
    begun = node.begin(built=node.old)
    assert begun.progress.begin.anew
    kit: Kit = node.kit()
    end = drive(begun, AgentRelease(kit), Quiet())
    assert end.state.value == "confirmed", end.reason
    assert node.machine.starts == [node.old.name, node.old.name]


# --- what it said


class Said:
    def __init__(self, folder: Path) -> None:
        self.layout = Layout(folder)
        self.layout.run.mkdir()
        self.log = self.layout.run / "agent.log"

    def mark(self, manager: str = "keeper") -> dict[str, Any]:
        return captured.mark(self.layout, "agent", manager, Clock())

    def tail(self, since: dict[str, Any], manager: str = "keeper") -> str:
        return captured.tail(self.layout, "agent", manager, since)


@pytest.fixture
def said(tmp_path: Path) -> Said:
    return Said(tmp_path)


def test_only_what_came_after_the_mark(said: Said) -> None:
    assert said.tail(said.mark()) == ""
    said.log.write_text("before\n")
    mark = said.mark()
    with said.log.open("a") as file:
        file.write("after\n")
    assert said.tail(mark) == "after"
    assert said.tail({}) == "before\nafter"
    assert said.tail({"bytes": "many", "wall": []}) == "before\nafter"


def test_a_log_that_was_put_aside_is_read_from_its_start(said: Said) -> None:
    said.log.write_text("x" * 5000)
    mark = said.mark()
    said.log.write_text("new\n")
    assert said.tail(mark) == "new"


def test_it_is_never_too_much_and_always_text(said: Said) -> None:
    said.log.write_bytes(b"\xff\xfe\x00" * 100_000)
    assert len(said.tail({}).encode()) <= captured.MOST_BYTES
    said.log.write_text("ä" * 10_000)
    assert len(said.tail({}).encode()) <= captured.MOST_BYTES
    said.log.write_text("\n".join(map(str, range(1000))))
    assert said.tail({}).split("\n")[0] == "960"


def test_a_link_or_a_folder_in_its_place_is_nothing(said: Said, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    said.log.symlink_to(secret)
    assert said.tail({}) == ""


def test_runit_keeps_it_in_a_folder_of_its_own(said: Said) -> None:
    (said.layout.run / "agent-log").mkdir()
    (said.layout.run / "agent-log/current").write_text("by svlogd\n")
    assert said.tail({}, "runit") == "by svlogd"


def test_without_a_journal_there_is_nothing(said: Said) -> None:
    said.tail(said.mark("systemd"), "systemd")  # whatever this machine has: it does not fail


def test_settings_have_bounds(node: Node) -> None:
    assert Settings().probe == ProbeSettings(10, 1.0)
    assert build("1.0.0").release.version == "1.0.0"
