"""A write that fails, an image that is gone, slots that cannot be opened: no good system is blamed for it, none that
is well is restarted, and everything has an end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import MachineError
from instar.core.journal import Progress, Reason
from instar.core.settings import Settings
from instar.core.transaction import State
from instar.core.wish import Wanted
from instar.engine.driver import drive
from instar.engine.journal import Journal
from instar.engine.target import NotNow
from instar.host.records import read_quarantine
from instar.oneshot.boot_guard import Machine, guard
from instar.targets.kit import Verdict
from instar.targets.os_slot import OsSlot
from instar.updater.driving import Driving
from instar.updater.orders import Orders
from instar.updater.system import System as Line
from tests.node.slots.images import Image
from tests.node.slots.system import Down, System, reason
from tests.node.world import FakeAgent, Quiet

WANTED = Wanted((), 300.0)
FULL = MachineError("esp-full", "no space left")
NO_ESP = MachineError("no-esp", "cannot use /efi: expected the EFI system partition to be mounted there")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, Image]:
    folder = tmp_path_factory.mktemp("images")
    return Image(folder, "1.0.0", 2), Image(folder, "1.1.0", 3)


@pytest.fixture(params=["firmware", "counting"])
def either(request: pytest.FixtureRequest, memory: Path, images: tuple[Image, Image]) -> Iterator[System]:
    yield from played(memory, images, request.param)


@pytest.fixture
def system(memory: Path, images: tuple[Image, Image]) -> Iterator[System]:
    yield from played(memory, images, "firmware")


def played(memory: Path, images: tuple[Image, Image], backend: str) -> Iterator[System]:
    made = System(memory / "s", *images, backend)
    made.power_on()
    yield made
    made.close()


def failing(do: Callable[..., Any], times: int) -> Callable[..., Any]:
    """`do`, which fails the first `times` times."""
    left = [times]

    def tried(*words: Any, **more: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise FULL
        return do(*words, **more)

    return tried


def confirmed_by_kexec(system: System) -> None:
    assert system.update("kexec").state is State.CONFIRMED
    assert not system.records()["b"].cold_boot_seen
    system.power_on()
    assert (system.version, system.booted) == ("1.1.0", "firmware")


def on_trial(system: System) -> Journal:
    """The new system has come up, and its updater has not begun to look at it."""
    system.begin("reboot")
    (journal,) = system.journals.unfinished()
    with pytest.raises(Down):
        drive(journal, system.start(), Quiet())
    system.after_down()
    assert system.version == "1.1.0"
    (journal,) = system.journals.unfinished()
    return journal


# --- what the firmware has started


class Updater:
    """Line os of the updater, and its rounds, on a played machine. `fault`: why the slots cannot be opened."""

    def __init__(self, system: System, target: OsSlot | None = None) -> None:
        self.system, self.target, self.fault = system, target or system.target(), None
        orders = Orders(threading.Lock(), threading.Event())
        kit, journals = self.target.kit, system.journals
        self.line = Line(kit, journals, orders, self._open, lambda: WANTED, lambda: None, system.reboot)
        self.driving = Driving(system.clock, journals, self, Quiet(), orders)  # type: ignore[arg-type]

    fault: MachineError | None

    def _open(self) -> Any:
        if self.fault is not None:
            raise self.fault
        return self.target.platform

    def any(self, line: str) -> OsSlot:
        return self.line.slot()

    def round(self) -> None:
        self.driving.put_off = []
        self.driving.drive_open(active_only=True)
        self.line.round(WANTED, self.driving)


def test_one_failed_write_at_the_start_blames_no_good_system(either: System) -> None:
    system = either
    confirmed_by_kexec(system)
    updater = Updater(system)
    boot = updater.target.platform.boot
    boot.prefer = failing(boot.prefer, 2)  # type: ignore[method-assign]
    updater.line.start()
    assert system.records()["b"].booted_by == "firmware"
    assert updater.line.report()["error"]["code"] == FULL.code
    updater.round()
    assert updater.driving.put_off == ["os"], "it is tried again soon"
    assert updater.line.report()["error"]["code"] == FULL.code
    updater.round()
    assert (updater.driving.put_off, updater.line.report()["error"]) == ([], None)
    assert system.records()["b"].cold_boot_seen
    assert system.boot.state().order[0] == "b"
    system.power_on()
    system.start()
    assert (system.version, system.records()["b"].state) == ("1.1.0", "good")


def test_a_power_cut_before_the_order_is_moved_blames_nobody_and_it_is_moved_then(either: System) -> None:
    system = either
    confirmed_by_kexec(system)
    target = system.target()
    target.platform.boot.prefer = failing(target.platform.boot.prefer, 1)  # type: ignore[method-assign]
    with pytest.raises(MachineError):
        target.cold_boot_seen()
    system.power_on()
    assert system.version == "1.0.0", "the order is the old one still"
    system.start()
    record = system.records()["b"]
    assert (record.state, record.cold_boot_seen, record.why) == ("good", True, "")
    assert read_quarantine(system.layout.quarantine) == {}
    assert system.boot.state().order[0] == "b"
    system.power_on()
    assert system.version == "1.1.0"


def test_what_the_firmware_did_not_start_is_left_all_the_same(either: System) -> None:
    system = either
    system.panics_cold = {"1.1.0"}
    assert system.update("kexec").state is State.CONFIRMED
    system.power_on()
    system.start()
    assert (system.version, system.records()["b"].state) == ("1.0.0", "bad")
    assert [each.version for each in read_quarantine(system.layout.quarantine).values()] == ["1.1.0"]


def test_a_record_that_cannot_be_written_does_not_keep_the_order_from_being_moved(system: System) -> None:
    confirmed_by_kexec(system)
    target = system.target()
    target.ledger.mark = failing(target.ledger.mark, 1)  # type: ignore[method-assign]
    with pytest.raises(MachineError):
        target.cold_boot_seen()
    assert system.boot.state().order[0] == "b"


# --- what is decided, and what cannot be


def test_the_guard_leaves_a_confirmed_system_alone_whose_order_cannot_be_written(system: System) -> None:
    journal, target = on_trial(system), system.start()
    target.platform.boot.prefer = failing(target.platform.boot.prefer, 9)  # type: ignore[method-assign]
    with pytest.raises(NotNow):
        drive(journal, target, Quiet())
    assert (journal.progress.state, system.records()["b"].state) == (State.CONFIRMING, "trial")
    assert "no trial is open" in guarded(system)


def test_the_guard_restarts_what_is_decided_against_and_not_left(system: System) -> None:
    system.verdict_said = Verdict("fail", Reason("worse", "it is"))
    journal, target = on_trial(system), system.start()
    target.platform.boot.prefer = failing(target.platform.boot.prefer, 9)  # type: ignore[method-assign]
    with pytest.raises(NotNow):
        drive(journal, target, Quiet())
    assert journal.progress.state is State.REVERTING
    with pytest.raises(Down):
        guarded(system)


def guarded(system: System) -> str:
    machine = Machine(lambda: system.running, system.reboot, system.reboot, system.clock.sleep)
    return guard(system.layout, Settings(), system.clock, machine)


def test_the_way_back_ends_where_the_old_kernel_image_is_gone(either: System) -> None:
    system = either
    system.broken = {"1.1.0"}
    on_trial(system)
    system.boot.kernel("a").unlink()
    progress = system.go_on()
    assert (progress.state, reason(progress)) == (State.REVERTED, "lease-lapsed")
    record = system.records()["b"]
    assert (system.version, record.state) == ("1.1.0", "bad")
    assert "slot a: it has no image" in record.why
    assert [each.version for each in read_quarantine(system.layout.quarantine).values()] == ["1.1.0"]
    (journal,) = system.journals.read_all()
    assert [each.reason.code for each in journal.records if each.kind == "note" and each.reason] == [
        "no-kernel-image"
    ]
    assert system.boot.state().order[0] == "b"
    system.power_on()
    assert system.version == "1.1.0"


@pytest.mark.parametrize("pid", [None, "x", [1], True])
def test_an_answer_without_a_pid_counts_as_none(system: System, pid: object) -> None:
    on_trial(system)
    system.close()
    system.agent = FakeAgent(system.layout.socket("agent"), lambda: {"pid": pid, "connected": True})
    progress = system.go_on()
    assert (progress.state, reason(progress), system.version) == (State.REVERTED, "lease-lapsed", "1.0.0")


# --- slots that cannot be opened


class Targets:
    """Line os, whose slots cannot be opened."""

    def __init__(self, system: System) -> None:
        self.restart = system.reboot

    def any(self, line: str) -> OsSlot:
        raise NO_ESP

    def system(self) -> Targets:
        return self


def unopened(system: System) -> Driving:
    orders = Orders(threading.Lock(), threading.Event())
    return Driving(system.clock, system.journals, Targets(system), Quiet(), orders)  # type: ignore[arg-type]


def test_a_system_that_cannot_open_its_slots_is_left_when_its_lease_is_spent(system: System) -> None:
    on_trial(system)
    with pytest.raises(NotNow):  # nothing else begins
        unopened(system).drive_open(active_only=True)
    system.clock.now += 15.0
    with pytest.raises(NotNow):
        unopened(system).drive_open(active_only=True)
    system.clock.now += 15.0
    with pytest.raises(Down):
        unopened(system).drive_open(active_only=True)
    system.after_down()
    progress = system.go_on()
    assert (system.version, progress.state, reason(progress)) == ("1.0.0", State.REVERTED, "fell-back")


def test_its_trial_goes_on_when_they_can_be_opened_in_time(system: System) -> None:
    on_trial(system)
    with pytest.raises(NotNow):
        unopened(system).drive_open(active_only=True)
    assert system.go_on().state is State.CONFIRMED


def test_it_is_not_restarted_for_ever_and_holds_nobody_up_then(system: System) -> None:
    on_trial(system)
    for _ in range(3):
        with pytest.raises(NotNow):
            unopened(system).drive_open(active_only=True)
        system.clock.now += 30.0
        with pytest.raises(Down):
            unopened(system).drive_open(active_only=True)
        system.clock.reboot()  # and the same one comes up again
    with pytest.raises(NotNow):
        unopened(system).drive_open(active_only=True)
    system.clock.now += 30.0
    driving = unopened(system)
    driving.drive_open(active_only=True)
    assert driving.put_off == ["os"]


def test_a_machine_that_does_not_go_down_holds_nobody_up_for_ever(system: System) -> None:
    on_trial(system)
    driving = unopened(system)
    driving.targets.restart = lambda: None  # type: ignore[attr-defined]
    for _ in range(4):
        with pytest.raises(NotNow):
            driving.drive_open(active_only=True)
        system.clock.now += 150.0
    driving.drive_open(active_only=True)
    driving.drive_open(active_only=True)


# --- age


def test_what_is_open_grows_old_through_the_starts_of_the_machine(system: System) -> None:
    system.begin("reboot", cause="push")
    driving = unopened(system)
    assert not is_old(driving)
    system.clock.now += 3000.0
    noted(system)
    system.clock.reboot()
    system.clock.now += 500.0
    assert not is_old(driving)
    noted(system)
    system.clock.reboot()
    system.clock.now += 200.0
    assert is_old(driving), "3000 and 505 and 205 s are more than an hour"


def test_what_is_open_grows_no_older_by_its_machines_clock_in_a_container(system: System) -> None:
    """Its host has been up for days, and it is started again and again."""
    system.clock.now = 90_000.0
    system.begin("reboot", cause="push")
    driving = unopened(system)
    for _ in range(2):
        system.clock.restart_container()
        assert not is_old(driving)
        noted(system)
        system.clock.now += 1500.0
        noted(system)
        assert not is_old(driving)
    system.clock.restart_container()
    system.clock.now += 500.0
    assert not is_old(driving)
    system.clock.now += 200.0
    assert is_old(driving), "twice 1500 and 700 s are more than an hour"


def test_a_fetch_for_the_server_has_a_day(system: System) -> None:
    system.begin("reboot")
    system.clock.reboot()
    system.clock.now = 86_000.0
    assert not is_old(unopened(system))
    system.clock.now = 86_500.0
    assert is_old(unopened(system))


def noted(system: System) -> None:
    (journal,) = system.journals.unfinished()
    journal.note({"again": "stage"}, Reason("server-unreachable", "no route"))


def is_old(driving: Driving) -> bool:
    (journal,) = driving.journals.unfinished()
    return driving._too_old(journal)


def test_what_is_too_old_ends_with_what_stood_in_the_way(system: System) -> None:
    system.begin("reboot", cause="push")
    noted(system)
    system.clock.reboot()
    system.clock.now += 4000.0
    updater = Updater(system)
    (journal,) = system.journals.unfinished()
    updater.driving.go_on(journal)
    said: Progress = journal.progress
    assert (said.state, reason(said)) == (State.REVERTED, "too-old")
