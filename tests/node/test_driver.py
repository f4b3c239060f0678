"""engine.driver over a target that is only memory: killed at every point, and driven on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instar.core.errors import InstarError, MachineError, ReleaseError, ServerUnreachable, TrustError
from instar.core.journal import Progress, Reason
from instar.core.recovery import Observation
from instar.core.transaction import MOST_TRIES, State, Step
from instar.engine.driver import BEFORE_ACTIVATION, abandon, drive
from instar.engine.journal import Journal, Journals
from instar.engine.target import Failed, HandOver, Notes, NotNow, Outcome
from instar.host import points
from instar.host.files import Disk
from tests.node.test_journal_records import BEGIN
from tests.node.world import UNSYNCED, FakeClock, Quiet

OLD, NEW = BEGIN.origin, BEGIN.release.name


class Kill(BaseException):
    pass


class Memory:
    """The world: which release is active, which ones are valid. Survives what happens to the driver."""

    def __init__(self) -> None:
        self.active, self.valid = OLD, {OLD}
        self.done: list[str] = []
        self.faults: dict[Step, list[BaseException]] = {}
        self.undone: Reason | None = None

    def observe(self, progress: Progress) -> Observation:
        return Observation(self.active, undone=self.undone)

    def _step(self, step: Step, effect: Callable[[], None] = lambda: None) -> Outcome:
        points.reach(f"effect:{step.value}:before")
        self.done.append(step.value)
        if faults := self.faults.get(step):
            raise faults.pop(0)
        effect()
        points.reach(f"effect:{step.value}:after")
        return Outcome({step.value: "done"})

    def stage(self, progress: Progress, notes: Notes) -> Outcome:
        return self._step(Step.STAGE)

    def verify(self, progress: Progress, notes: Notes) -> Outcome:
        return self._step(Step.VERIFY, lambda: self.valid.add(NEW))

    def rehearse(self, progress: Progress, notes: Notes) -> Outcome:
        assert NEW in self.valid
        return self._step(Step.REHEARSE)

    def activate(self, progress: Progress, notes: Notes) -> Outcome:
        notes.note({"before": "health"})
        return self._step(Step.ACTIVATE, lambda: setattr(self, "active", NEW))

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        assert self.active == NEW
        return self._step(Step.WATCH)

    def confirm(self, progress: Progress, notes: Notes) -> Outcome:
        assert self.active == NEW
        return self._step(Step.CONFIRM)

    def revert(self, progress: Progress, notes: Notes) -> Outcome:
        def put_back() -> None:
            self.active = OLD
            self.valid.discard(NEW)

        return self._step(Step.REVERT, put_back)


class World:
    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.target, self.told = folder, FakeClock(), Memory(), Quiet()
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def journals(self) -> Journals:
        return Journals(self.folder, self.clock, UNSYNCED)

    def begin(self, tx: str = "tx-1") -> Journal:
        return self.journals.begin(dataclasses.replace(BEGIN, tx=tx))

    def start_again(self) -> Progress | None:
        """What an updater does at its start: read the disk, drive what is open."""
        journals = self.journals.open_all() or [self.begin()]
        return drive(journals[0], self.target, self.told)

    def check(self) -> None:
        assert self.target.active in (OLD, NEW)
        assert self.target.active in self.target.valid
        assert not list(self.folder.glob("*.unreadable"))
        assert all(j.progress is not None for j in self.journals.read_all())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield World(tmp_path / "journal")
    points.listener = None


def points_of(folder: Path, faults: dict[Step, list[BaseException]]) -> list[str]:
    """Every point that an undisturbed run reaches, in order."""
    seen: list[str] = []
    world = World(folder)
    world.target.faults = faults
    points.listener = seen.append
    try:
        world.start_again()
    finally:
        points.listener = None
    return seen


FAULTS: dict[str, Callable[[], dict[Step, list[BaseException]]]] = {
    "good": dict,
    **{
        f"{step.value} fails": lambda step=step: {step: [Failed(Reason("bad", "it is")) for _ in range(9)]}  # type: ignore[misc]
        for step in (Step.STAGE, Step.VERIFY, Step.REHEARSE, Step.ACTIVATE, Step.WATCH)
    },
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_kill_at_every_point_is_survived(tmp_path: Path, fault: str) -> None:
    reached = points_of(tmp_path / "plain", FAULTS[fault]())
    assert len(reached) > 10
    for number in range(len(reached)):
        survive(World(tmp_path / str(number)), FAULTS[fault](), [number], good=fault == "good")


@pytest.mark.parametrize("fault", ["good", "watch fails"])
def test_a_second_kill_during_recovery_is_survived(tmp_path: Path, fault: str) -> None:
    reached = points_of(tmp_path / "plain", FAULTS[fault]())
    for first in range(len(reached)):
        for second in range(0, 12, 2):
            world = World(tmp_path / f"{first}-{second}")
            survive(world, FAULTS[fault](), [first, second], good=fault == "good")


def survive(world: World, faults: dict[Step, list[BaseException]], kills: list[int], good: bool) -> None:
    world.target.faults = faults
    left = -1

    def listen(point: str) -> None:
        nonlocal left
        if left == 0:
            left = -1
            raise Kill(point)
        left -= 1

    points.listener = listen
    try:
        for left in kills:  # noqa: B007 - the listener counts it down
            try:
                world.start_again()
            except Kill:
                pass
            world.check()
        left = -1
        end = world.start_again()
    finally:
        points.listener = None
    world.check()
    assert end is not None
    assert end.finished
    assert world.target.active == (NEW if good else OLD)
    assert end.state is (State.CONFIRMED if good else State.REVERTED)
    assert world.journals.unfinished() == []


# --- what a step may raise


def test_a_good_run_tells_each_state(world: World) -> None:
    end = world.start_again()
    assert end is not None
    assert end.state is State.CONFIRMED
    assert world.told.states == ["staged", "verified", "rehearsed", "trial", "confirming", "confirmed"]
    assert end.data["stage"] == "done"


def test_not_now_leaves_it_open_and_uses_up_no_tries(world: World) -> None:
    world.target.faults = {Step.STAGE: [NotNow(Reason("later", "it is busy")) for _ in range(20)]}
    for _ in range(20):
        with pytest.raises(NotNow):
            world.start_again()
        (journal,) = world.journals.unfinished()
        assert journal.progress.state is State.OFFERED
        assert journal.progress.tries[Step.STAGE] == 0
    end = world.start_again()
    assert end is not None
    assert end.state is State.CONFIRMED


def test_a_server_that_cannot_be_reached_never_decides(world: World) -> None:
    for step in (Step.STAGE, Step.REHEARSE, Step.ACTIVATE, Step.WATCH, Step.CONFIRM):
        world.target.faults[step] = [ServerUnreachable("server-busy", "429") for _ in range(7)]
    for _ in range(5 * 7):
        with pytest.raises(NotNow) as caught:
            world.start_again()
        assert caught.value.reason.code == "server-busy"
    end = world.start_again()
    assert end is not None
    assert end.state is State.CONFIRMED


@pytest.mark.parametrize(
    ("fault", "blame", "code"),
    [
        (Failed(Reason("x", "")), True, "x"),
        (Failed(Reason("x", ""), blame=False), False, "x"),
        (ReleaseError("x", ""), True, "x"),
        (TrustError("x", ""), True, "x"),
        (MachineError("disk-full", ""), False, "disk-full"),
        (InstarError("x", ""), False, "x"),
        (OSError(28, "No space left on device", "/f"), False, "machine"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("step", [Step.STAGE, Step.VERIFY, Step.REHEARSE, Step.ACTIVATE, Step.WATCH])
def test_a_failure_reverts_with_its_reason_and_blame(
    world: World, step: Step, fault: BaseException, blame: bool, code: str
) -> None:
    world.target.faults = {step: [fault]}
    end = world.start_again()
    assert end is not None
    assert end.state is State.REVERTED
    if isinstance(fault, TrustError) and step is not Step.VERIFY:
        blame = False  # not the release's own bytes: the server's or a mirror's fault
    assert end.data["blame"] is blame
    assert end.reason is not None
    assert end.reason.code == code
    assert world.target.active == OLD


@pytest.mark.parametrize("step", list(MOST_TRIES))
def test_a_step_that_always_ends_the_process_is_begun_a_bounded_number_of_times(
    world: World, step: Step
) -> None:
    def kill(point: str) -> None:
        if point == f"effect:{step.value}:before":
            raise Kill

    points.listener = kill
    for _ in range(MOST_TRIES[step]):
        with pytest.raises(Kill):
            world.start_again()
    end = world.start_again()
    assert world.target.done.count(step.value) == 0
    assert end is not None
    assert end.state is State.REVERTED
    assert end.reason is not None
    assert end.reason.code == "interrupted-too-often"


def test_a_fault_of_ours_goes_up_and_is_bounded_too(world: World) -> None:
    world.target.faults = {Step.VERIFY: [ZeroDivisionError() for _ in range(20)]}
    for _ in range(MOST_TRIES[Step.VERIFY]):
        with pytest.raises(ZeroDivisionError):
            world.start_again()
    end = world.start_again()
    assert end is not None
    assert end.state is State.REVERTED


@pytest.mark.parametrize(
    ("step", "state"), [(Step.CONFIRM, State.CONFIRMING), (Step.REVERT, State.REVERTING)]
)
def test_one_way_states_are_tried_until_they_are_done(world: World, step: Step, state: State) -> None:
    world.target.faults = {step: [MachineError("disk-full", "no space") for _ in range(15)]}
    if step is Step.REVERT:
        world.target.faults[Step.WATCH] = [Failed(Reason("first", ""), blame=False)]
    for _ in range(15):
        with pytest.raises(NotNow):
            world.start_again()
        (journal,) = world.journals.unfinished()
        assert journal.progress.state is state
    end = world.start_again()
    assert end is not None
    assert end.finished
    if step is Step.REVERT:
        assert end.reason == Reason("first", "")
        assert end.data["blame"] is False  # later failures do not put the blame on the release


def test_a_hand_over_leaves_the_step_begun(world: World) -> None:
    world.target.faults = {Step.ACTIVATE: [HandOver("x")]}
    with pytest.raises(HandOver):
        world.start_again()
    (journal,) = world.journals.unfinished()
    assert journal.progress.state is State.REHEARSED
    assert journal.progress.intended(Step.ACTIVATE)
    end = world.start_again()
    assert end is not None
    assert end.state is State.CONFIRMED


def test_a_trial_that_was_undone_meanwhile_is_reverted(world: World) -> None:
    world.target.faults = {Step.WATCH: [NotNow(Reason("later", ""))]}
    with pytest.raises(NotNow):
        world.start_again()
    world.target.active, world.target.undone = OLD, Reason("attempts-used-up", "3 times")
    end = world.start_again()
    assert end is not None
    assert end.state is State.REVERTED
    assert end.reason == Reason("attempts-used-up", "3 times")
    assert world.target.done.count("watch") == 1


# --- giving up


@pytest.mark.parametrize("step", [Step.STAGE, Step.VERIFY, Step.REHEARSE, Step.ACTIVATE, Step.WATCH])
def test_only_what_is_not_active_can_be_given_up(world: World, step: Step) -> None:
    world.target.faults = {step: [NotNow(Reason("later", ""))]}
    with pytest.raises(NotNow):
        world.start_again()
    (journal,) = world.journals.unfinished()
    given_up = abandon(journal, world.target, Reason("superseded", "another one is wanted"))
    assert given_up is (step is not Step.WATCH)
    assert (journal.progress.state in BEFORE_ACTIVATION) is False
    end = drive(journal, world.target, world.told)
    assert end.state is (State.REVERTED if given_up else State.CONFIRMED)
    if given_up:
        assert end.data["blame"] is False


def test_what_is_half_active_cannot_be_given_up(world: World) -> None:
    journal = world.begin()
    world.target.active = NEW
    assert not abandon(journal, world.target, Reason("superseded", ""))
    assert journal.progress.state is State.OFFERED


# --- the journal's files


def test_a_torn_tail_is_cut_off_and_a_torn_beginning_is_no_journal(world: World) -> None:
    journal = world.begin()
    journal.intent(Step.STAGE)
    whole = journal.path.read_bytes()
    for cut in range(len(whole)):
        journal.path.write_bytes(whole[:cut])
        opened = world.journals.open_all()
        assert [len(j.records) for j in opened] == ([1] if b"\n" in whole[:cut] else [])
        if opened:
            opened[0].intent(Step.STAGE)  # what comes after a torn tail stands on a line of its own
            assert len(world.journals.open_all()[0].records) == 2
    assert not list(world.folder.glob("*.unreadable"))


def test_an_unreadable_journal_is_set_aside_and_the_others_are_read(world: World) -> None:
    bad, good = world.begin("tx-bad"), world.begin("tx-good")
    bad.intent(Step.STAGE)
    bad.path.write_bytes(b"nonsense\n" + bad.path.read_bytes())
    assert [j.path for j in world.journals.read_all()] == [good.path]
    assert bad.path.exists()  # who only looks changes nothing
    assert [j.path for j in world.journals.open_all()] == [good.path]
    assert not bad.path.exists()
    assert bad.path.with_suffix(".unreadable").exists()


def test_a_record_that_makes_no_sense_is_not_written(world: World) -> None:
    journal = world.begin()
    before = journal.path.read_bytes()
    with pytest.raises(InstarError):
        journal.intent(Step.CONFIRM)
    assert journal.path.read_bytes() == before


def test_a_full_disk_in_the_middle_of_a_record_leaves_a_readable_journal(world: World) -> None:
    class Full(Disk):
        room = 10

        def append(self, path: Path, data: bytes, mode: int) -> None:
            if self.room < len(data):
                super().append(path, data[: self.room], mode)
                raise OSError(28, "No space left on device")
            super().append(path, data, mode)

    world.begin()
    disk = Full()
    (journal,) = Journals(world.folder, world.clock, disk).open_all()
    with pytest.raises(MachineError) as caught:
        journal.intent(Step.STAGE)
    assert caught.value.code == "disk-full"
    disk.room = 10_000
    journal.intent(Step.STAGE)
    assert [r.kind for r in world.journals.open_all()[0].records] == ["begin", "intent"]


def test_pruning_keeps_the_newest_and_whatever_is_open(world: World) -> None:
    for number in range(6):
        world.clock.now += 1
        drive(world.begin(f"tx-{number}"), Memory(), world.told)
    world.begin("tx-open")
    world.journals.prune(2)
    assert [j.progress.begin.tx for j in world.journals.read_all()] == ["tx-4", "tx-5", "tx-open"]
