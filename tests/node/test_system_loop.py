"""Line os in the updater's rounds: the last of all, once for each word of the server, and never in the way."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from instar.core.errors import InputError, MachineError
from instar.core.journal import Begin, Progress, Reason
from instar.core.recovery import Observation
from instar.core.releases import Release
from instar.core.settings import OsSettings
from instar.core.system import ColdBoot, SystemWish
from instar.core.transaction import Event, Step
from instar.core.wish import Wanted
from instar.engine.journal import Journal
from instar.engine.target import Notes, NotNow, Outcome
from instar.targets.slots.platform import Platform
from instar.updater.driving import Driving
from instar.updater.loop import Loop
from instar.updater.orders import Orders, Updating
from instar.updater.slots import open_platform
from instar.updater.system import Refusing, System
from instar.updater.targets import Targets
from tests.node.looping import World
from tests.node.world import Node, Quiet

DIGEST = "fe" * 48
NO_DISK = MachineError("disk-failed", "cannot read /dev/nvme9n1: No such file or directory")


def wish(generation: int = 9, mode: str = "reboot") -> SystemWish:
    return SystemWish(Release("2.0.0", DIGEST), "os/lab-2.0.0.bundle", generation, mode)


class Systems(World):
    """A node whose settings name slots that cannot be used, for the reason `fault`."""

    def __init__(self, node: Node, fault: Exception | None = NO_DISK) -> None:
        self.fault, self.opened, self.told = fault, 0, 0
        self.system_wish: SystemWish | None = None
        self.cold_boot: ColdBoot | None = None
        super().__init__(node)

    def again(self) -> None:
        super().again()
        kit = replace(self.node.kit(), brought=self.orders.brought)
        kit = replace(kit, settings=replace(kit.settings, os=OsSettings(disk="/dev/nvme9n1")))
        self.made = System(kit, self.node.journals, self.orders, self._open, self._wanted, self._tell)
        self.loop = Loop(
            self.node.layout, self.node.clock, Targets(kit, lambda: self.made), self, self.follower,  # type: ignore[arg-type]
            self.loop.settings, self.orders,
        )  # fmt: skip

    def _open(self) -> Platform:
        self.opened += 1
        assert self.fault is not None
        raise self.fault

    def _tell(self) -> None:
        self.told += 1

    def _wanted(self) -> Wanted:
        return self.wanted()

    def wanted(self, trouble: str = "") -> Wanted:
        found = self.client.wanted(trouble)
        return replace(found, system=self.system_wish, cold_boot=self.cold_boot)

    @property
    def ended(self) -> list[tuple[str, str, str]]:
        """(line, state, reason's code) of each transaction, in their order."""
        return [
            (p.begin.line, p.state.value, p.reason.code if p.reason else "")
            for p in (journal.progress for journal in self.node.journals.read_all())
        ]


@pytest.fixture
def world(node: Node) -> Systems:
    return Systems(node)


def test_slots_that_cannot_be_used_refuse_with_the_cause_after_the_programs_were_updated(
    world: Systems,
) -> None:
    world.system_wish = wish()
    assert world.loop.round() > 0
    assert world.current == world.node.new.name
    assert world.ended == [("agent", "confirmed", ""), ("os", "reverted", "disk-failed")]
    last = world.begun[-1]
    assert (last.generation, last.mode, last.target, last.cause) == (
        9,
        "reboot",
        "os/lab-2.0.0.bundle",
        "wish",
    )
    assert world.told > 0
    report = world.made.report()
    assert (report["slots"], report["error"]["code"], report["update"]) == ({}, "disk-failed", None)


def test_a_wish_is_begun_once_and_a_newer_one_anew(world: Systems) -> None:
    world.system_wish = wish()
    for _ in range(3):
        world.loop.round()
    assert [each for each in world.ended if each[0] == "os"] == [("os", "reverted", "disk-failed")]
    world.system_wish = wish(10)
    world.loop.round()
    assert sorted(begin.generation for begin in world.begun if begin.line == "os") == [9, 10]


def test_slots_are_looked_for_again_in_each_round(world: Systems) -> None:
    """An EFI system partition may be mounted later."""
    world.loop.round()
    world.loop.round()
    before = world.opened
    world.loop.round()
    assert world.opened > before


def test_node_whose_settings_name_no_slots_says_which_setting(node: Node) -> None:
    world = Systems(node)
    world.fault = InputError("no-slots", "os.disk names none")
    world.system_wish = wish()
    world.loop.round()
    assert world.ended[-1] == ("os", "reverted", "no-slots")
    with pytest.raises(InputError, match=r"os\.disk of its config\.toml") as error:
        open_platform(OsSettings(), node.layout, lambda: Path("x"))
    assert error.value.code == "no-slots"


def test_node_that_nobody_wants_a_system_of_is_not_looked_at(node: Node) -> None:
    """Without `[os]`."""

    def none() -> System:
        raise AssertionError("made in vain")

    world = World(node)
    targets = Targets(node.kit(), none)
    loop = Loop(
        node.layout, node.clock, targets, world.client, Quiet(), world.loop.settings, world.orders  # type: ignore[arg-type]
    )  # fmt: skip
    loop.round()
    assert world.current == node.new.name


def test_wish_that_cannot_be_read_begins_and_ends_nothing(world: Systems) -> None:
    begin = Begin("tx-1", "os", "2.0.0", DIGEST, "os/x", "", "", "wish", 9, mode="reboot")
    world.node.journals.begin(begin)
    world.client.wanted = lambda trouble="": Wanted((), 300.0, fault="cannot read the wanted system")  # type: ignore[method-assign]
    world.loop.round()
    assert world.ended == [("os", "offered", "")]


def test_open_system_update_whose_slots_are_gone_is_left_alone_and_tried_again_soon(world: Systems) -> None:
    begin = Begin("tx-1", "os", "2.0.0", DIGEST, "os/x", "", "", "wish", 9, mode="reboot")
    journal = world.node.journals.begin(begin)
    for step in (Step.STAGE, Step.VERIFY, Step.REHEARSE, Step.ACTIVATE):
        done(journal, step)
    assert world.loop.round() < 60.0, "it waits until the server is asked again"
    assert world.current == world.node.new.name, "programs are updated all the same"
    assert ("os", "trial", "") in world.ended


def done(journal: Journal, step: Step) -> None:
    journal.intent(step)
    journal.outcome(step, Event.DONE, None, {})


def test_cold_boot_waits_for_its_time_and_is_ordered_once(world: Systems) -> None:
    world.client.wishes = []
    world.cold_boot = ColdBoot(12, world.node.clock.wall() + 50.0)
    assert world.loop.round() <= 50.0
    assert world.begun == []
    world.node.clock.now += 51.0
    world.loop.round()
    assert world.ended == [("os", "reverted", "disk-failed")]
    assert (world.begun[0].cause, world.begun[0].generation) == ("cold-boot", 12)
    for journal in world.node.journals.read_all():
        journal.path.unlink()  # as `prune` does, some day
    world.loop.round()
    assert world.begun == []
    world.cold_boot = ColdBoot(13, 0.0)
    world.loop.round()
    assert len(world.begun) == 1


def test_order_of_an_operator_outlives_the_updater_that_took_it(world: Systems) -> None:
    ordered = Updating(
        "tx-0123456789abcdef", "2.0.0", DIGEST, "os/lab-2.0.0.bundle", "none", "https://h/x", True
    )
    world.orders.order_update(ordered)
    with pytest.raises(InputError) as error:
        world.orders.order_update(ordered._replace(tx="tx-other"))
    assert error.value.code == "busy"
    world.again()  # it was killed before it began
    assert world.orders.update == ordered
    world.loop.round()
    begin = next(begin for begin in world.begun if begin.line == "os")
    assert (begin.tx, begin.cause, begin.mode, begin.source) == (ordered.tx, "push", "none", "https://h/x")
    assert (begin.override, begin.generation, begin.via) == (True, 0, "")
    assert not world.node.layout.orders.exists()
    world.again()
    assert world.orders.update is None


def test_order_is_kept_while_the_server_is_away(world: Systems) -> None:
    world.client.away = True
    world.orders.order_update(Updating("tx-0123456789abcdef", "2.0.0", DIGEST, "os/x-2.0.0.bundle", "none"))
    world.loop.round()
    assert world.orders.update is not None
    assert world.begun == []
    world.client.away = False
    world.loop.round()
    assert world.ended[-1][0] == "os"


def test_rollback_of_slots_that_cannot_be_used_is_refused(world: Systems) -> None:
    with pytest.raises(MachineError) as error:
        world.made.previous()
    assert error.value.code == "disk-failed"
    world.orders.order_rollback("os")
    world.loop.round()
    assert world.begun == []
    assert not world.orders.waiting()
    world.loop.round()
    assert world.current == world.node.new.name, "it keeps nobody waiting"


def test_generations_of_a_cold_boot_do_not_stand_against_a_wish(world: Systems) -> None:
    world.cold_boot = ColdBoot(12, 0.0)
    world.loop.round()
    world.system_wish = wish(11)
    world.loop.round()
    assert sorted(begin.cause for begin in world.begun if begin.line == "os") == ["cold-boot", "wish"]


def test_order_that_nobody_can_fetch_ends_after_an_hour_with_what_stood_in_the_way(node: Node) -> None:
    clock = node.clock
    begin = Begin("tx-1", "os", "2.0.0", DIGEST, "os/x", "", "", "push", mode="none", source="https://h/x")
    journal = node.journals.begin(begin)
    targets = Targets(node.kit(), lambda: SimpleNamespace(slot=Waiting))  # type: ignore[arg-type, return-value]
    driving = Driving(clock, node.journals, targets, Quiet(), Orders(threading.Lock(), threading.Event()))
    for _ in range(2):
        with pytest.raises(NotNow):
            driving.go_on(journal)
        clock.now += 1700.0
    clock.now += 300.0
    driving.go_on(journal)
    reason = journal.progress.reason
    assert reason is not None
    assert (reason.code, reason.text) == ("too-old", "it could not be activated within 1 h: no route to h")


class Waiting(Refusing):
    """Slots whose image cannot be fetched now."""

    def __init__(self) -> None:
        super().__init__(NO_DISK)

    def stage(self, progress: Progress, notes: Notes) -> Outcome:
        raise NotNow(Reason("server-unreachable", "no route to h"))


class Slow(Waiting):
    def stage(self, progress: Progress, notes: Notes) -> Outcome:
        raise NotNow(Reason("slow", "its turn has ended"))


def test_transfer_whose_turn_has_ended_goes_on_soon(world: Systems) -> None:
    world.made._slot = Slow()  # type: ignore[assignment]
    world.system_wish = wish()
    opened(world, ())
    assert max(world.loop.round() for _ in range(8)) <= world.loop.settings.retry_floor_s


# --- what must not be in the way of the other lines


class Stuck(Refusing):
    """Slots whose boot order cannot be written."""

    def __init__(self) -> None:
        super().__init__(MachineError("no-variables", "cannot write the boot order: read-only"))
        self.tries = 0

    def confirm(self, progress: Progress, notes: Notes) -> Outcome:
        self.tries += 1
        raise self._why

    revert = confirm


def opened(world: Systems, steps: tuple[Step, ...], cause: str = "wish") -> Journal:
    begin = Begin("tx-1", "os", "2.0.0", DIGEST, "os/x", "", "", cause, 9, mode="reboot")
    journal = world.node.journals.begin(begin)
    for step in steps:
        done(journal, step)
    return journal


ALL = (Step.STAGE, Step.VERIFY, Step.REHEARSE, Step.ACTIVATE)


@pytest.mark.parametrize("end", ["confirm", "revert"])
def test_end_that_cannot_be_reached_keeps_no_other_line_waiting(world: Systems, end: str) -> None:
    stuck = world.made._slot = Stuck()  # type: ignore[assignment]
    journal = opened(world, ALL)
    journal.intent(Step.WATCH)
    said = Reason("lease-lapsed", "nobody said a word")
    if end == "confirm":
        journal.outcome(Step.WATCH, Event.DONE, None, {})
    else:
        journal.outcome(Step.WATCH, Event.FAILED, said, {})
    assert world.loop.round() < 60.0, "it is tried again soon"
    assert stuck.tries == 1, "once in a round"
    assert world.current == world.node.new.name
    world.orders.order_rollback("agent")
    world.client.away = True
    world.loop.round()
    assert world.current != world.node.new.name, "what an operator orders is done, too"
    assert ("os", f"{end}ing", said.code if end == "revert" else "") in world.ended


def test_second_one_is_not_begun_beside_an_end_that_cannot_be_reached(world: Systems) -> None:
    world.made._slot = Stuck()  # type: ignore[assignment]
    journal = opened(world, ALL)
    done(journal, Step.WATCH)
    world.system_wish = wish(10)
    world.orders.order_rollback("os")
    world.loop.round()
    world.loop.round()
    assert [each for each in world.ended if each[0] == "os"] == [("os", "confirming", "")]
    assert not world.orders.waiting(), "or nothing else could be ordered"


class Asked(Refusing):
    """The switch is known to have been reached."""

    def __init__(self) -> None:
        super().__init__(NO_DISK)
        self.activated = 0

    def observe(self, progress: Progress) -> Observation:
        return Observation(progress.begin.release.name)

    def activate(self, progress: Progress, notes: Notes) -> Outcome:
        self.activated += 1
        raise NotNow(Reason("server-unreachable", "no route"))


def test_system_that_may_have_come_up_goes_on_without_a_server(world: Systems) -> None:
    asked = world.made._slot = Asked()  # type: ignore[assignment]
    world.loop.round()  # the agent has something to go back to
    world.client.away = True
    journal = opened(world, ALL[:3])
    journal.intent(Step.ACTIVATE)
    journal.note({"left_boot": world.node.clock.boot_id()})
    world.loop.round()
    assert asked.activated == 0, "it has not been left yet, and comes last"
    world.node.clock.reboot()
    world.orders.order_rollback("agent")
    world.loop.round()
    assert asked.activated == 1
    assert world.current != world.node.new.name, "nor does it keep an order waiting"


# --- finding the slots


def test_what_is_wrong_with_the_slots_is_said(tmp_path: Path, node: Node) -> None:
    from tests.node.system_host import disk_image

    disk, esp = tmp_path / "disk.img", tmp_path / "esp"
    settings = OsSettings(disk=str(disk), esp=str(esp))

    def code(changed: OsSettings = settings) -> str:
        with pytest.raises(MachineError) as error:
            open_platform(changed, node.layout, lambda: Path("x"))
        return error.value.code

    assert code() == "no-esp"
    esp.mkdir()
    assert code() == "disk-failed"
    disk.write_bytes(bytes(1 << 20))
    assert code() == "no-gpt"
    disk.write_bytes(disk_image())
    assert code(replace(settings, slots=("instar-system-a", "other"))) == "no-partition"
    if not Path("/sys/firmware/efi/efivars").is_dir():
        assert code() == "no-variables"
    assert list(node.layout.state.glob("os/*")) == [], "to look changes nothing"
