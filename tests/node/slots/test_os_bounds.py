"""Nothing of a system update goes on for ever, and nothing is put first before it has passed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from instar.core.errors import ServerUnreachable
from instar.core.transaction import State
from instar.core.wish import Wanted
from instar.engine.driver import drive
from instar.engine.target import NotNow
from instar.host import points
from instar.host.boot.slots import BootState
from instar.host.records import read_quarantine
from instar.updater.system import AskingSlot
from tests.node.slots.images import Image
from tests.node.slots.system import Down, System, reason
from tests.node.world import Quiet


@pytest.fixture
def unseen(system: System) -> System:
    """1.1.0 runs, confirmed, and only kexec has started it."""
    assert system.update("kexec").state is State.CONFIRMED
    system.downs.clear()
    return system


@pytest.fixture
def cut() -> Iterator[object]:
    """Takes the power away at a named point, once."""

    def at(point: str) -> None:
        def listen(reached: str) -> None:
            if reached == point:
                points.listener = None
                raise Down

        points.listener = listen

    yield at
    points.listener = None


def goes_down(system: System) -> None:
    """The open transaction until the machine goes down, and what comes up then."""
    target = system.start()
    (journal,) = system.journals.unfinished()
    with pytest.raises(Down):
        drive(journal, target, Quiet())
    system.after_down()


# --- a neighbour that only kexec has started


def test_one_on_trial_is_not_put_first_for_an_unseen_neighbour(
    unseen: System, images: tuple[Image, ...]
) -> None:
    """It crashes in its trial: the machine must not come back to it."""
    unseen.offer(images[2])
    unseen.begin("reboot", "tx-2", override=True)
    goes_down(unseen)
    assert unseen.version == "1.2.0"
    unseen.start()
    assert unseen.boot.state().order[0] == "b"
    assert unseen.records()["b"].state == "good"
    unseen.panics = {"1.2.0"}
    unseen.power_on()
    progress = unseen.go_on()
    assert (progress.state, reason(progress), unseen.version) == (State.REVERTED, "fell-back", "1.1.0")
    assert (unseen.records()["b"].state, unseen.records()["b"].cold_boot_seen) == ("good", True)
    assert [entry.version for entry in read_quarantine(unseen.layout.quarantine).values()] == ["1.2.0"]


@pytest.mark.parametrize("way", ["update", "rollback"])
def test_what_was_left_unseen_is_still_a_way_back(
    unseen: System, images: tuple[Image, ...], way: str
) -> None:
    """The firmware was never asked for it: nothing is known against it."""
    if way == "update":
        unseen.offer(images[2])
        assert unseen.update("reboot", "tx-2", override=True).state is State.CONFIRMED
    else:
        unseen.begin_rollback()
        assert unseen.go_on().state is State.CONFIRMED
    target = unseen.start()
    assert unseen.running == "a"
    assert unseen.records()["b"].state == "good"
    assert target.usable("b")
    assert not read_quarantine(unseen.layout.quarantine)


# --- firmware that starts another slot than it was told to


def always(system: System, slot: str) -> None:
    """From now on the firmware starts this slot, whatever it is told."""
    system._by_firmware = lambda: system.boot.kernel(slot)  # type: ignore[method-assign]


def test_machine_that_never_comes_up_on_what_was_confirmed_stays_where_it_is(
    system: System, cut: object
) -> None:
    system.begin()
    goes_down(system)
    cut("step:confirm:before")  # type: ignore[operator]
    goes_down(system)
    system.downs.clear()
    always(system, "a")
    system.power_on()
    progress = system.go_on()
    assert (system.version, len(system.downs)) == ("1.0.0", 1)
    assert progress.data["left"]
    assert (system.records()["b"].state, system.boot.state().order[0]) == ("bad", "a")


def test_machine_that_never_comes_up_on_the_old_system_stays_where_it_is(system: System) -> None:
    system.begin()
    goes_down(system)
    system.broken = {"1.1.0"}
    always(system, "b")
    progress = system.go_on()
    assert (progress.state, reason(progress), system.version) == (State.REVERTED, "lease-lapsed", "1.1.0")
    assert 1 < len(system.downs) <= 5
    assert system.records()["b"].state == "bad"
    assert "comes up all the same" in system.records()["b"].why


# --- a switch that was cut off


def test_candidate_without_a_network_goes_on_to_its_trial(system: System, cut: object) -> None:
    """The power went after the firmware was asked: what came up has nobody to ask once more. The old system has."""

    def away() -> Wanted:
        raise ServerUnreachable("server-unreachable", "no route")

    system.begin()
    cut("os:asked")  # type: ignore[operator]
    goes_down(system)
    assert system.version == "1.1.0"
    (journal,) = system.journals.unfinished()
    made = system.start()
    target = AskingSlot(made.kit, made.platform)
    target.ask = away
    system.running = "a"
    with pytest.raises(NotNow):
        drive(journal, target, Quiet())
    system.running = "b"
    assert drive(journal, target, Quiet()).state is State.CONFIRMED


# --- a system that does not say which slot it is


@pytest.mark.parametrize("back", [True, False], ids=["the old one says it", "the old one does not either"])
def test_candidate_that_nobody_can_tell_is_left_by_one_more_start(system: System, back: bool) -> None:
    plain = system._start

    def unknown(kernel: bytes | None) -> bool:
        up = plain(kernel)
        if not back or system.running == "b":
            system.running = ""
        return up

    system._start = unknown  # type: ignore[method-assign]
    system.begin()
    goes_down(system)
    assert system.running == ""
    progress = system.go_on()
    assert (progress.state, reason(progress), system.downs) == (
        State.REVERTED,
        "fell-back",
        ["reboot", "reboot"],
    )
    assert (system.running, system.records()["b"].state) == ("a" if back else "", "bad")
    assert ("nobody can tell" in system.records()["b"].why) is not back
    (journal,) = system.journals.open_all()
    assert "unknown-slot" in [record.reason.code for record in journal.records if record.reason]


# --- the guard's mark


def test_the_slot_counts_as_on_trial_before_the_firmware_is_asked_for_it(system: System) -> None:
    """Where the power goes right then, the guard of a system without an updater knows what to do."""
    seen: list[tuple[str, BootState]] = []
    points.listener = lambda point: (
        seen.append((system.records()["b"].state, system.boot.state())) if point == "os:asked" else None
    )
    try:
        system.begin()
        goes_down(system)
    finally:
        points.listener = None
    assert [(state, boot.once) for state, boot in seen] == [("trial", "b")]
