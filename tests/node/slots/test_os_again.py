"""A slot that holds the wanted system already is read back, not written again; one that holds half is gone on with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.core.errors import ServerUnreachable
from instar.core.journal import Reason
from instar.core.transaction import Event, State, Step, deadline_s
from instar.engine.driver import abandon, drive
from instar.engine.target import NotNow
from instar.targets.os_slot import OsSlot
from instar.targets.slots.install import LEAST_TURN_S, TURN_S
from instar.targets.slots.source import FIRST
from tests.node.slots.images import Image
from tests.node.slots.system import System
from tests.node.world import Quiet


def stamp(system: System) -> tuple[int, int]:
    """When the other slot, and its kernel image, were written last."""
    return system.slots["b"].device.stat().st_mtime_ns, system.boot.kernel("b").stat().st_mtime_ns


@pytest.mark.parametrize("mode", ["reboot", "kexec"])
def test_what_was_installed_alone_is_activated_without_being_written(system: System, mode: str) -> None:
    system.update("none")
    before, served = stamp(system), system.source_file.served
    progress = system.update(mode, "tx-2")
    assert (progress.state, system.version, system.downs) == (State.CONFIRMED, "1.1.0", [mode])
    assert stamp(system) == before
    assert system.source_file.served == served  # not even the manifest came again
    assert progress.data["skipped"] is True
    assert progress.data["bytes"] == {"fetched": 0, "reused": len(system.new.root)}


def test_kernel_image_that_is_gone_is_brought_again(system: System) -> None:
    system.update("none")
    slot, _ = stamp(system)
    system.boot.kernel("b").unlink()
    progress = system.update("reboot", "tx-2")
    assert (progress.state, system.version) == (State.CONFIRMED, "1.1.0")
    assert stamp(system)[0] == slot
    assert 0 < progress.data["bytes"]["fetched"] < len(system.new.root)


def test_kernel_image_that_is_damaged_is_placed_again(system: System) -> None:
    system.update("none")
    kernel = system.boot.kernel("b")
    kernel.write_bytes(kernel.read_bytes()[:-1] + b"x")
    assert system.update("reboot", "tx-2").state is State.CONFIRMED
    assert kernel.read_bytes() == system.new.kernel


def test_root_image_that_is_damaged_is_written_again(system: System) -> None:
    system.update("none")
    flip(system, "b")
    progress = system.update("reboot", "tx-2")
    assert (progress.state, system.version, progress.data["skipped"]) == (State.CONFIRMED, "1.1.0", False)


def test_manifest_that_is_lost_is_asked_for_again(system: System) -> None:
    system.update("none")
    (system.layout.state / "os/b.manifest").unlink()
    assert system.update("reboot", "tx-2").data["skipped"] is False
    assert system.version == "1.1.0"


def test_slot_that_is_bad_is_written_again(system: System) -> None:
    system.panics = {"1.1.0"}
    system.update()
    system.panics = set()
    progress = system.update("reboot", "tx-2")
    assert (progress.state, progress.data["skipped"]) == (State.CONFIRMED, False)


def test_way_forward_again_after_a_rollback_writes_nothing(system: System) -> None:
    system.update()
    system.begin_rollback()
    assert system.go_on().state is State.CONFIRMED
    assert system.version == "1.0.0"
    before = stamp(system)
    assert system.update("reboot", "tx-3").data["skipped"] is True
    assert (system.version, stamp(system)) == ("1.1.0", before)


def test_flipped_bit_is_found_when_it_is_read_back(system: System) -> None:
    """The disk does not keep what was written to it."""
    system.begin()
    target, (journal,) = system.target(), system.journals.open_all()
    journal.intent(journal.progress.step)
    outcome = target.stage(journal.progress, journal)
    flip(system, "b")
    journal.outcome(Step.STAGE, Event.DONE, None, outcome.data)
    progress = drive(journal, target, Quiet())
    assert progress.state is State.REVERTED
    assert progress.reason is not None
    assert progress.reason.code == "not-as-written"
    assert system.records()["b"].state == "bad"
    assert not system.boot.kernel("b").exists()


def test_cut_transfer_goes_on_from_its_checkpoint(memory: Path) -> None:
    old, new = Image(memory, "1.0.0", 2, 100 << 10), Image(memory, "1.1.0", 9, 20 << 20)
    system = System(memory / "s", old, new, slot_bytes=24 << 20)
    system.power_on()
    system.source_file.cut_after = 12 << 20
    system.begin("none")
    (journal,) = system.journals.open_all()
    with pytest.raises(NotNow):
        drive(journal, system.target(), Quiet())
    record = system.records()["b"]
    assert record.state == "writing"
    assert record.done >= 8 << 20
    served = system.source_file.served
    assert drive(journal, system.target(), Quiet()).state is State.CONFIRMED
    assert system.source_file.served - served < 13 << 20
    assert system.slots["b"].device.read_bytes().startswith(new.root)
    system.close()


def test_slow_transfer_is_gone_on_with_in_another_turn(system: System) -> None:
    """Before the step's deadline would end it for good."""
    plain = system.source_file.stream

    def slow(*where: object) -> object:
        system.clock.now += TURN_S + 1.0
        return plain(*where)  # type: ignore[arg-type]

    system.source_file.stream = slow  # type: ignore[method-assign, assignment]
    system.begin("none")
    target, (journal,) = system.target(), system.journals.open_all()
    with pytest.raises(ServerUnreachable, match="goes on") as error:
        target.stage(journal.progress, journal)
    assert error.value.code == "slow"


def test_turn_ends_early_for_who_waits_but_not_at_once(system: System) -> None:
    """A transfer must not keep an order waiting, and an order that stays must not keep the transfer from getting on."""
    plain, waits = system.source_file._pieces, [True]

    def slow(*where: object) -> Iterator[bytes]:
        for piece in plain(*where):  # type: ignore[arg-type]
            system.clock.now += LEAST_TURN_S * 0.6
            yield piece

    system.source_file._pieces = slow  # type: ignore[method-assign, assignment]
    system.begin("none")
    made, (journal,) = system.target(), system.journals.open_all()
    target = OsSlot(made.kit, made.platform, waited=lambda: waits[0])
    with pytest.raises(ServerUnreachable) as error:
        target.stage(journal.progress, journal)
    assert error.value.code == "slow"
    assert system.source_file.served > FIRST, "its manifest came, and more"
    waits[0] = False
    assert target.stage(journal.progress, journal).data["slot"] == "b"


def test_manifest_that_never_ends_does_not_keep_the_node(system: System) -> None:
    def drops(*_: object) -> Iterator[bytes]:
        while True:
            system.clock.now += 20.0
            assert system.clock.now < 10_000.0, "for ever"
            yield b"I"

    system.source_file._pieces = drops  # type: ignore[method-assign, assignment]
    system.begin("none")
    target, (journal,) = system.target(), system.journals.open_all()
    before = system.everything()
    with pytest.raises(ServerUnreachable) as error:
        target.stage(journal.progress, journal)
    assert (error.value.code, system.everything()) == ("slow", before)


def test_slots_that_are_read_back_have_more_time(system: System) -> None:
    seen: list[float] = []

    def bound(seconds: float) -> contextlib.AbstractContextManager[None]:
        seen.append(seconds)
        return contextlib.nullcontext()

    system.begin("none")
    (journal,) = system.journals.open_all()
    assert drive(journal, system.target(), Quiet(), bound).state is State.CONFIRMED
    assert seen[1] == deadline_s("os", Step.VERIFY) == 1800.0
    assert deadline_s("agent", Step.VERIFY) == 300.0


def test_given_up_before_the_switch_leaves_what_was_there(system: System) -> None:
    """A whole system that was installed before is not made bad by an update to it that was cancelled."""
    system.update("none")
    records = system.records()
    system.begin("reboot", "tx-2")
    journal = system.journals.open_all()[-1]
    target = system.target()
    for step, do in ((Step.STAGE, target.stage), (Step.VERIFY, target.verify)):
        journal.intent(step)
        journal.outcome(step, Event.DONE, None, do(journal.progress, journal).data)
    assert abandon(journal, target, Reason("superseded", "no longer wanted"))
    assert drive(journal, target, Quiet()).state is State.REVERTED
    assert system.records() == records
    assert system.boot.kernel("b").exists()


def flip(system: System, slot: str) -> None:
    with system.slots[slot].device.open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)
        file.seek(100_000)
        file.write(bytes((byte[0] ^ 1,)))
