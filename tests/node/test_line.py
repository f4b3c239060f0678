"""host.line and host.trials: releases, links and the trial's record on a real disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from instar.core.errors import MachineError, ReleaseError
from instar.core.journal import Reason
from instar.core.trial import Lease
from instar.host import points, trials
from instar.host.line import Line
from instar.host.trials import Trial
from tests.node.world import Node, build, put

WHY = Reason("attempts-used-up", "it did not stay up")


class Kill(BaseException):
    pass


def trial(node: Node, **changes: object) -> Trial:
    lease = Lease(2.0, 20.0, node.clock.boot_id(), node.clock.boottime())
    fields: dict[str, object] = {
        "tx": "tx-1", "release": node.new.name, "previous": node.old.name, "max_attempts": 3, "lease": lease,
    }  # fmt: skip
    return Trial(**{**fields, **changes})  # type: ignore[arg-type]


def on_trial(node: Node) -> Trial:
    put(node.line, node.new)
    record = trial(node)
    trials.write(node.line, record)
    node.line.activate(node.new.name, fallback=node.old.name)
    return record


def test_a_valid_release_passes(node: Node) -> None:
    node.line.check(node.old.name)
    assert node.line.is_valid(node.old.name)
    assert node.line.current() == node.old.name
    assert node.line.previous() == ""


def spoil_program(f: Path) -> None:
    (f / "instar.pyz").write_bytes((f / "instar.pyz").read_bytes()[:-1] + b"x")


def link_program(f: Path) -> None:
    (f / "instar.pyz").rename(f / "other")
    (f / "instar.pyz").symlink_to("other")


SPOILT: dict[str, Callable[[Path], object]] = {
    "damaged file": spoil_program,
    "shortened file": lambda f: (f / "instar.pyz").write_bytes(b""),
    "missing file": lambda f: (f / "instar.pyz").unlink(),
    "missing file below": lambda f: (f / "doc" / "notes.txt").unlink(),
    "altered manifest": lambda f: (f / "manifest.json").write_bytes(b'{"files": []}'),
    "missing manifest": lambda f: (f / "manifest.json").unlink(),
    "missing marker": lambda f: (f / "valid").unlink(),
    "empty marker": lambda f: ((f / "valid").chmod(0o600), (f / "valid").write_bytes(b"")),
    "marker of bytes": lambda f: ((f / "valid").chmod(0o600), (f / "valid").write_bytes(b"\xff\xfe")),
    "link in place of a file": link_program,
    "folder in place of a file": lambda f: ((f / "instar.pyz").unlink(), (f / "instar.pyz").mkdir()),
}


@pytest.mark.parametrize("how", list(SPOILT))
def test_a_release_that_is_not_as_signed_is_not_valid(node: Node, how: str) -> None:
    SPOILT[how](node.line.folder(node.old.name))
    with pytest.raises(ReleaseError) as caught:
        node.line.check(node.old.name)
    assert caught.value.code == "release-damaged"
    assert not node.line.is_valid(node.old.name)


@pytest.mark.parametrize("name", ["", "..", "../../etc", "1.0.0-000000000000", "."])
def test_what_is_no_release_is_not_valid(node: Node, name: str) -> None:
    assert not node.line.is_valid(name)


def test_current_is_not_pointed_to_a_damaged_release(node: Node) -> None:
    put(node.line, node.new)
    spoil_program(node.line.folder(node.new.name))
    with pytest.raises(ReleaseError):
        node.line.activate(node.new.name, fallback=node.old.name)
    assert (node.line.current(), node.line.previous()) == (node.old.name, "")


def test_activating_moves_previous_first(node: Node) -> None:
    put(node.line, node.new)
    node.line.activate(node.new.name, fallback=node.old.name)
    node.line.activate(node.new.name, fallback=node.old.name)
    assert (node.line.current(), node.line.previous()) == (node.new.name, node.old.name)


def test_a_link_that_leads_elsewhere_names_nothing(node: Node, tmp_path: Path) -> None:
    for target in ("/etc", "releases/..", "../agent/releases/" + node.old.name, "releases/x", node.old.name):
        node.line.layout.current.unlink()
        node.line.layout.current.symlink_to(target)
        assert node.line.current() == ""


def test_a_link_to_a_missing_release_names_it_but_it_is_not_valid(node: Node) -> None:
    node.line.layout.current.unlink()
    node.line.layout.current.symlink_to("releases/9.9.9-0123456789ab")
    assert node.line.current() == "9.9.9-0123456789ab"
    assert not node.line.is_valid(node.line.current())


def test_names_come_in_the_order_of_versions(node: Node) -> None:
    for version in ("1.10.0", "1.9.0", "1.10.0-rc1"):
        put(node.line, build(version))
    (node.line.layout.releases / "lost+found").mkdir()
    assert [n.rpartition("-")[0] for n in node.line.names()] == ["1.0.0", "1.9.0", "1.10.0-rc1", "1.10.0"]


def test_collecting_keeps_current_previous_and_what_it_is_told(node: Node) -> None:
    others = [build(f"0.{n}.0") for n in range(4)]
    for built in (*others, node.new):
        put(node.line, built)
    node.line.activate(node.new.name, fallback=node.old.name)
    gone = node.line.collect(keep=[others[0].name])
    assert sorted(gone) == sorted(b.name for b in others[1:])
    assert sorted(node.line.names()) == sorted([others[0].name, node.old.name, node.new.name])


def test_collecting_without_a_current_removes_nothing(node: Node) -> None:
    put(node.line, node.new)
    node.line.layout.current.unlink()
    assert node.line.collect(keep=()) == []
    assert len(node.line.names()) == 2


def test_what_a_link_points_to_is_not_removed(node: Node) -> None:
    with pytest.raises(MachineError) as caught:
        node.line.remove_release(node.old.name)
    assert caught.value.code == "release-in-use"
    node.line.remove_release("9.9.9-0123456789ab")  # not there: fine


# --- the trial's record


def test_a_trials_record_comes_back_as_it_was(node: Node) -> None:
    for record in (trial(node), trial(node, attempts=2, undone=WHY), trial(node, confirmed=True)):
        trials.write(node.line, record)
        assert trials.read(node.line) == record
        assert record.open is (record.undone is None and not record.confirmed)
    node.line.end_trial()
    node.line.end_trial()
    assert trials.read(node.line) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"v": 2}', b'{"v":1}', b"\xff"])
def test_a_record_that_cannot_be_read_is_no_trial(node: Node, data: bytes) -> None:
    node.line.layout.trial.write_bytes(data)
    assert trials.read(node.line) is None
    assert node.line.current() == node.old.name


@pytest.mark.parametrize("field", ["lease", "attempts", "undone", "max_attempts"])
def test_a_record_with_a_bad_field_is_no_trial(node: Node, field: str) -> None:
    trials.write(node.line, trial(node))
    body = json.loads(node.line.layout.trial.read_bytes())
    node.line.layout.trial.write_text(json.dumps({**body, field: "x"}))
    assert trials.read(node.line) is None


def test_undoing_puts_the_previous_release_back_and_keeps_why(node: Node) -> None:
    record = on_trial(node)
    trials.undo(node.line, record, WHY)
    assert node.line.current() == node.old.name
    after = trials.read(node.line)
    assert after is not None
    assert after.undone == WHY


def test_the_first_reason_stays(node: Node) -> None:
    trials.undo(node.line, on_trial(node), WHY)
    record = trials.read(node.line)
    assert record is not None
    trials.undo(node.line, record, Reason("second", "noise"))
    assert trials.read(node.line) == record


def test_without_a_valid_previous_release_current_stays(node: Node) -> None:
    record = on_trial(node)
    spoil_program(node.line.folder(node.old.name))
    trials.undo(node.line, record, WHY)
    assert node.line.current() == node.new.name


@pytest.mark.usefixtures("listener")
def test_a_kill_between_the_reason_and_the_link_is_finished_by_undoing_again(node: Node) -> None:
    def kill(point: str) -> None:
        if point == "undo:written":
            raise Kill

    points.listener = kill
    with pytest.raises(Kill):
        trials.undo(node.line, on_trial(node), WHY)
    assert node.line.current() == node.new.name
    points.listener = None
    record = trials.read(Line(node.layout.line("agent")))
    assert record is not None
    assert record.undone == WHY
    trials.undo(node.line, record, Reason("other", ""))
    assert node.line.current() == node.old.name


def test_a_trial_lapses_by_itself_only_when_nobody_judged_it_for_a_while_beyond_its_cap(node: Node) -> None:
    """The updater judges at the cap, and must not race with the guards over whose fault it is."""
    record = trial(node)
    node.clock.now += 24.9  # the cap is 20 s, and a quarter of it on top
    assert not trials.lapsed(record, node.clock)
    node.clock.now += 0.2
    assert "25 s" in trials.lapsed(record, node.clock)


def test_the_record_is_private(node: Node) -> None:
    trials.write(node.line, trial(node))
    assert os.stat(node.line.layout.trial).st_mode & 0o777 == 0o600
