"""The agent's releases, through the real engine, on real files, with a server and an agent of memory."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from instar.core import quarantine
from instar.core.errors import MachineError, ServerRefused, ServerUnreachable, TrustError
from instar.core.journal import Progress, Reason
from instar.core.quarantine import FIRST_S
from instar.core.trial import Lease
from instar.engine.driver import drive
from instar.engine.journal import Journal
from instar.engine.target import NotNow
from instar.host import points, trials
from instar.host.records import read_quarantine
from instar.targets.kit import Verdict
from tests.node.world import WAIT, Built, Node, Quiet, build, put


class Kill(BaseException):
    pass


def update(node: Node, journal: Journal | None = None) -> Progress:
    if "agent" not in node.machine.running:
        node.boot()
    return drive(journal or node.begin(), node.target(), Quiet())


def assert_on_new(node: Node) -> None:
    assert (node.line.current(), node.line.previous()) == (node.new.name, node.old.name)
    assert node.machine.running["agent"] == node.new.name
    settled(node)


def assert_on_old(node: Node) -> None:
    assert node.line.current() == node.old.name
    assert node.machine.running["agent"] == node.old.name
    assert node.line.names() == [node.old.name]
    settled(node)


def settled(node: Node) -> None:
    assert node.line.is_valid(node.line.current())
    assert trials.read(node.line) is None
    assert list(node.layout.staging.iterdir()) == []
    assert node.journals.unfinished() == []


def kept_out(node: Node, built: Built | None = None) -> quarantine.Entry | None:
    name = quarantine.key("agent", (built or node.new).release.digest)
    return read_quarantine(node.layout.quarantine).get(name)


def test_a_good_release_is_confirmed(node: Node) -> None:
    end = update(node)
    assert end.state.value == "confirmed", end.reason
    assert_on_new(node)
    assert kept_out(node) is None
    assert end.data["before"] == {"connected": True, "modules": {"base": "ok"}}


def test_the_release_before_the_previous_one_is_collected(node: Node) -> None:
    first = build("0.9.0")
    put(node.line, first)
    node.line.activate(node.old.name, fallback=first.name)
    update(node)
    assert node.line.names() == sorted([node.old.name, node.new.name])


# --- each step's failure


def broken_archive(node: Node) -> None:
    node.server.served.data = node.new.archive[:-1] + b"x"


def wrong_program(node: Node) -> None:
    custom = {"version": "1.1.0", "program_digest": "0" * 96}
    real = node.server.trusted_target
    node.server.trusted_target = lambda *a: replace(real(*a), custom=custom)  # type: ignore[method-assign]


def fault(error: Exception) -> Callable[[Node], None]:
    return lambda node: setattr(node.server, "fault", error)


def verdict(phase: str, word: str, code: str = "") -> Callable[[Node], None]:
    return lambda node: node.server.verdicts.update({phase: Verdict(word, Reason(code, "so it is"))})


def module(state: str) -> Callable[[Node], None]:
    def spoil(node: Node) -> None:
        healthy = node.said

        def said() -> object:
            answer = healthy()
            if isinstance(answer, dict) and answer["digest"] == node.new.release.digest:
                answer["modules"] = {"base": state}
            return answer

        node.said = said  # type: ignore[assignment]

    return spoil


def nonsense(data: bytes) -> Callable[[Node], None]:
    def spoil(node: Node) -> None:
        healthy = node.said
        node.said = lambda: data if node.machine.running.get("agent") == node.new.name else healthy()

    return spoil


FAILURES: dict[str, tuple[Callable[[Node], object], str, bool]] = {
    "metadata not trusted": (fault(TrustError("expired-metadata", "no")), "expired-metadata", False),
    "server refuses": (fault(ServerRefused("revoked", "no")), "revoked", False),
    "machine cannot": (fault(MachineError("no-space", "no")), "no-space", False),
    "bytes altered": (broken_archive, "altered-blob", True),
    "wish differs from what is signed": (wrong_program, "wish-differs", False),
    "server says no to the rehearsal": (verdict("rehearsal", "fail", "wrong-reply"), "wrong-reply", True),
    "server saw no rehearsal": (verdict("rehearsal", "wait"), "no-verdict", True),
    "server says no to the trial": (verdict("trial", "fail", "wrong-reply"), "wrong-reply", True),
    "server never says yes": (verdict("trial", "wait"), "lease-lapsed", True),
    "it crashes on trial": (lambda n: n.crashing.add(n.new.name), "attempts-used-up", True),
    "a module got worse": (module("failed"), "lease-lapsed", True),
    "it talks no JSON": (nonsense(b"hello\n"), "lease-lapsed", True),
    "it says an odd pid": (nonsense(b'{"ok": true, "pid": "many", "digest": 5}\n'), "lease-lapsed", True),
    "it says odd modules": (nonsense(b'{"ok": true, "pid": 7, "modules": [[]]}\n'), "lease-lapsed", True),
    "it nests deeply": (nonsense(b"[" * 60_000 + b"\n"), "lease-lapsed", True),
}  # fmt: skip


@pytest.mark.parametrize("failure", list(FAILURES))
def test_a_failure_ends_on_the_old_release_with_its_reason(node: Node, failure: str) -> None:
    spoil, code, blame = FAILURES[failure]
    spoil(node)
    end = update(node)
    assert end.state.value == "reverted"
    assert end.reason is not None
    assert end.reason.code == code, end.reason
    assert_on_old(node)
    entry = kept_out(node)
    assert (entry is not None) is blame
    if entry is not None:
        assert entry.reason == end.reason
        assert entry.version == "1.1.0"


@pytest.mark.parametrize("text", ["import sys; sys.exit('it is broken')", "import os; os.abort()"])
def test_a_release_that_fails_its_rehearsal_is_never_activated(node: Node, text: str) -> None:
    node.new = build("1.1.0", text)
    node.server.offered, node.server.served.data = node.new, node.new.archive
    node.server.sha256 = hashlib.sha256(node.new.archive).hexdigest()
    node.server.verdicts["rehearsal"] = WAIT
    end = update(node)
    assert end.reason is not None
    assert end.reason.code == "rehearsal-failed"
    assert ("it is broken" in end.reason.text) or ("SIGABRT" in end.reason.text)
    assert_on_old(node)
    assert set(node.machine.starts) == {node.old.name}


# --- health compared with before


def test_what_was_bad_before_may_stay_bad(node: Node) -> None:
    node.modules, node.connected = {"base": "failed"}, False
    assert update(node).state.value == "confirmed"


def test_an_agent_that_was_silent_before_is_replaced_all_the_same(node: Node) -> None:
    node.crashing.add(node.old.name)
    assert update(node).state.value == "confirmed"


# --- the network


def test_a_silent_server_stretches_the_trial_and_then_it_is_confirmed(node: Node) -> None:
    node.boot()
    began = node.clock.now

    def network() -> None:
        node.machine.look_after()
        on_trial = node.machine.running["agent"] == node.new.name
        away = on_trial and node.clock.now - began < 10.0  # longer than the lease, shorter than the cap
        node.server.fault = ServerUnreachable("server-unreachable", "no route") if away else None
        node.connected = not away

    def listen(point: str) -> None:
        if point == "activate:flipped":
            node.server.fault = ServerUnreachable("server-unreachable", "no route")

    node.clock.on_sleep, points.listener = network, listen
    try:
        journal = node.begin()
        end = update(node, journal)
    finally:
        points.listener = None
    assert end.state.value == "confirmed", end.reason
    assert node.clock.now - began >= 10.0
    notes = [r for r in journal.records if r.reason is not None and r.reason.code == "trial-stretched"]
    assert len(notes) == 1


def test_a_server_that_stays_silent_reverts_at_the_cap_and_blames_nobody(node: Node) -> None:
    def listen(point: str) -> None:
        if point == "activate:flipped":
            node.server.fault = ServerUnreachable("server-unreachable", "no route")

    points.listener = listen
    try:
        end = update(node)
    finally:
        points.listener = None
    assert end.state.value == "reverted"
    assert end.reason is not None
    assert end.reason.code == "unconfirmed"
    assert_on_old(node)
    assert kept_out(node) is None


def test_a_cut_during_the_fetch_is_resumed(node: Node) -> None:
    node.server.served.cut_at = [100, 300]
    assert update(node).state.value == "confirmed"
    assert node.server.served.asked == [0, 100, 300]


@pytest.mark.parametrize("phase", ["stage", "verdict"])
def test_a_server_that_cannot_be_reached_before_the_switch_is_waited_for(node: Node, phase: str) -> None:
    away = ServerUnreachable("server-unreachable", "no route")
    points.listener = (
        (lambda p: setattr(node.server, "fault", away) if p == "rehearse:run" else None)
        if phase == "verdict"
        else None
    )
    node.server.fault = away if phase == "stage" else None
    journal = node.begin()
    for _ in range(8):
        with pytest.raises(NotNow):
            update(node, journal)
    points.listener, node.server.fault = None, None
    assert update(node, journal).state.value == "confirmed"


# --- quarantine


def test_a_failure_is_counted_once_although_the_updater_was_killed(node: Node) -> None:
    node.server.verdicts["rehearsal"] = Verdict("fail", Reason("wrong-reply", "it"))
    journal = node.begin()
    for point in ("revert:quarantined", "step:revert:after", "journal:revert:outcome:done:before"):

        def kill(at: str, wanted: str = point) -> None:
            if at == wanted:
                raise Kill

        points.listener = kill
        with pytest.raises(Kill):
            update(node, journal)
        points.listener = None
        node.clock.now += 7 * 86400
        (journal,) = node.journals.unfinished()
    update(node, journal)
    entry = kept_out(node)
    assert entry is not None
    assert entry.count == 1


def test_a_second_failure_keeps_it_away_longer(node: Node) -> None:
    node.server.verdicts["rehearsal"] = Verdict("fail", Reason("wrong-reply", "it"))
    update(node)
    node.clock.now += FIRST_S + 1
    update(node, node.begin("tx-2"))
    entry = kept_out(node)
    assert entry is not None
    assert (entry.count, entry.until - entry.since) == (2, 2 * FIRST_S)


# --- the way back


def test_a_rollback_goes_to_the_previous_release_without_the_server(node: Node) -> None:
    update(node)
    node.server.fault = ServerUnreachable("server-unreachable", "no route")
    end = update(node, node.begin("tx-2", "rollback", node.old))
    assert end.state.value == "confirmed", end.reason
    assert node.line.current() == node.old.name
    assert node.machine.running["agent"] == node.old.name
    entry = kept_out(node)
    assert entry is not None
    assert entry.reason.code == "rolled-back"
    settled(node)


def test_a_rollback_to_a_release_that_crashes_comes_forward_again(node: Node) -> None:
    update(node)
    node.crashing.add(node.old.name)
    end = update(node, node.begin("tx-2", "rollback", node.old))
    assert end.state.value == "reverted"
    assert (node.line.current(), node.line.previous()) == (node.new.name, node.old.name)
    assert kept_out(node) is None
    assert kept_out(node, node.old) is None


@pytest.mark.parametrize("crashes", [False, True])
def test_a_rollback_that_is_killed_anywhere_comes_to_its_end(folder: Path, crashes: bool) -> None:
    """Killed at each arrival at a named point, and driven on: one valid release, old or new, as without the kill."""
    for arrival in itertools.count(1):
        node = Node(folder / str(arrival))
        update(node)
        if crashes:
            node.crashing.add(node.old.name)
        journal = node.begin("tx-2", "rollback", node.old)
        left = arrival

        def listen(_: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Kill

        points.listener = listen
        try:
            update(node, journal)
        except Kill:
            pass
        finally:
            points.listener = None
        for opened in node.journals.unfinished():
            update(node, opened)
        end = node.journals.read_all()[-1].progress
        assert end.state.value == ("reverted" if crashes else "confirmed"), (arrival, end.reason)
        assert node.line.current() == (node.new if crashes else node.old).name
        assert node.machine.running["agent"] == node.line.current()
        settled(node)
        node.close()
        if left > 0:
            assert arrival > 10, "the rollback has hardly a point to be killed at"
            return


def test_a_rollback_to_a_damaged_release_changes_nothing(node: Node) -> None:
    update(node)
    (node.line.folder(node.old.name) / "doc" / "notes.txt").chmod(0o600)
    (node.line.folder(node.old.name) / "doc" / "notes.txt").write_bytes(b"x")
    end = update(node, node.begin("tx-2", "rollback", node.old))
    assert end.reason is not None
    assert end.reason.code == "release-damaged"
    assert node.line.current() == node.new.name


@pytest.mark.parametrize("failure", ["it crashes on trial", "server says no to the trial", "bytes altered"])
def test_a_revert_restores_what_previous_was(node: Node, failure: str) -> None:
    first = build("0.9.0")
    put(node.line, first)
    node.line.activate(node.old.name, fallback=first.name)
    FAILURES[failure][0](node)
    assert update(node).state.value == "reverted"
    assert (node.line.current(), node.line.previous()) == (node.old.name, first.name)


# --- what others left


def test_a_trial_left_by_a_lost_journal_does_not_spoil_the_next_update(node: Node) -> None:
    lost = node.begin("tx-lost")
    points.listener = lambda p: (_ for _ in ()).throw(Kill()) if p == "activate:flipped" else None
    with pytest.raises(Kill):
        update(node, lost)
    points.listener = None
    lost.path.write_bytes(b"nonsense\nnonsense\n")
    assert node.journals.unfinished() == []
    record = trials.read(node.line)
    assert record is not None
    trials.undo(node.line, record, Reason("lease-lapsed", "nobody confirmed it"))
    node.machine.restart("agent")
    assert update(node, node.begin("tx-2")).state.value == "confirmed"
    assert_on_new(node)


def test_a_lease_goes_on_in_the_next_boot(node: Node) -> None:
    node.server.verdicts["trial"] = WAIT
    journal = node.begin()
    count = 0

    def cut() -> None:
        nonlocal count
        node.machine.look_after()
        count += node.machine.running["agent"] == node.new.name
        if count == 20:
            raise Kill

    node.clock.on_sleep = cut
    with pytest.raises(Kill):
        update(node, journal)
    node.clock.on_sleep = node.machine.look_after
    node.clock.reboot()
    node.machine.running.clear()
    node.boot()
    end = update(node, node.journals.unfinished()[0])
    assert end.reason is not None
    assert end.reason.code == "lease-lapsed"
    assert_on_old(node)


def test_the_end_that_was_written_first_wins(node: Node) -> None:
    """A guard undoes the trial right before the updater would confirm it."""
    update_target = node.target()
    put(node.line, node.new)
    journal = node.begin()
    lease = Lease(2.0, 20.0, node.clock.boot_id(), node.clock.now)
    record = trials.Trial("tx-1", node.new.name, node.old.name, 3, lease)
    for first in ("undo", "confirm"):
        trials.write(node.line, record)
        node.line.activate(node.new.name, fallback=node.old.name)
        if first == "confirm":
            update_target.commit(journal.progress)
        else:
            trials.undo(node.line, record, Reason("lease-lapsed", "over"))
        try:
            update_target.commit(journal.progress)
            committed = True
        except Exception as error:  # noqa: BLE001
            committed = False
            assert "over" in str(error)
        assert committed is (first == "confirm")


def test_the_reason_is_in_the_journal_for_people(node: Node) -> None:
    node.server.verdicts["trial"] = Verdict("fail", Reason("wrong-reply", "the reply was wrong"))
    journal = node.begin()
    update(node, journal)
    lines = [json.loads(line[9:]) for line in journal.path.read_bytes().splitlines()]
    assert any(line["reason"] and line["reason"]["text"] == "the reply was wrong" for line in lines)
