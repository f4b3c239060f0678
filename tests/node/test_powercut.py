"""Power cuts anywhere: single files, the journal, and whole updates. hypothesis chooses the schedule."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instar.core.journal import Begin, Progress, Reason
from instar.core.transaction import Event, Step
from instar.engine.driver import drive
from instar.engine.journal import Journal, Journals
from instar.host import trials
from instar.host.files import point_link, write_atomic
from instar.targets.kit import Verdict
from tests.node.powercut import PowerCut, PowerDisk
from tests.node.test_journal_records import BEGIN
from tests.node.test_stage_parcel import bring
from tests.node.world import FakeClock, Node, Quiet, put

MEMORY = Path("/dev/shm")
PARENT = str(MEMORY) if MEMORY.is_dir() else None

insides = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
bits = st.integers(0, 2**48 - 1)


def keeps(chosen: int, number: int) -> bool:
    return bool(chosen >> (number % 48) & 1)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="i-", dir=PARENT, ignore_cleanup_errors=True) as name:
        yield Path(name)


def new_folder(place: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=place))


# --- single files


@given(st.integers(-1, 8), insides, st.booleans(), bits, st.booleans())
def test_a_file_is_the_old_one_or_the_new_one(
    place: Path, cut: int, inside: float, zeros: bool, chosen: int, there: bool
) -> None:
    root, after = new_folder(place), new_folder(place) / "after"
    if there:
        (root / "f").write_bytes(b"the old bytes")
        (root / "l").symlink_to("old")
    disk = PowerDisk(root, cut, inside, zeros)
    whole = False
    try:
        write_atomic(root / "f", b"the new and longer bytes", disk=disk)
        point_link(root / "l", "new", disk)
        whole = True
    except PowerCut:
        pass
    disk.reboot(after, lambda n: keeps(chosen, n))
    data = (after / "f").read_bytes() if (after / "f").exists() else None
    link = (after / "l").readlink().name if (after / "l").is_symlink() else None
    assert data in (b"the old bytes" if there else None, b"the new and longer bytes")
    assert link in ("old" if there else None, "new")
    if whole:
        assert (data, link) == (b"the new and longer bytes", "new")


# --- the journal


STEPS = [
    (Step.STAGE, Event.DONE), (Step.VERIFY, Event.DONE), (Step.REHEARSE, Event.DONE),
    (Step.ACTIVATE, Event.DONE), (Step.WATCH, Event.FAILED), (Step.REVERT, Event.DONE),
]  # fmt: skip


def write_on(journals: Journals) -> int:
    """Write from where the journal stands; the number of records that it has when the power goes."""
    opened = journals.open_all()
    journal = opened[0] if opened else journals.begin(BEGIN)
    for step, event in STEPS:
        if journal.progress.finished or journal.progress.step is not step:
            continue
        journal.intent(step)
        journal.outcome(step, event, Reason("x", "y") if event is Event.FAILED else None, {"n": "d" * 50})
    return len(journal.records)


@given(st.lists(st.tuples(st.integers(0, 20), insides, st.booleans(), bits), min_size=1, max_size=3))
def test_the_journal_is_always_readable_and_loses_nothing_that_was_written(
    place: Path, cuts: list[tuple[int, float, bool, int]]
) -> None:
    root, written = new_folder(place), 0
    for cut, inside, zeros, chosen in cuts:
        disk = PowerDisk(root, cut, inside, zeros)
        journals = Journals(root, FakeClock(), disk)
        try:
            write_on(journals)
        except PowerCut:
            pass
        durable = [j for j in Journals(root, FakeClock()).read_all() if j.path in disk.durable]
        written = max(written, len(durable[0].records) - 1 if durable else 0)
        root = new_folder(place) / "after"
        disk.reboot(root, lambda n, chosen=chosen: keeps(chosen, n))  # type: ignore[misc]
        found = Journals(root, FakeClock(), PowerDisk(root)).open_all()
        assert not list(root.glob("*.unreadable"))
        assert len(found) <= 1
        assert (len(found[0].records) if found else 0) >= written
    write_on(Journals(root, FakeClock(), PowerDisk(root)))
    (journal,) = Journals(root, FakeClock()).read_all()
    assert journal.progress.finished


# --- whole updates


class Power:
    """A node whose power goes; what is left is started again in another folder."""

    def __init__(self, place: Path, bad: bool) -> None:
        self.place, self.bad = place, bad
        self.node = Node(new_folder(place) / "s")
        self._settle()

    def _settle(self) -> None:
        if self.bad:
            self.node.server.verdicts["trial"] = Verdict("fail", Reason("wrong-reply", "it was"))

    def begin(self) -> Journal:
        return self.node.begin()

    def settled(self) -> None:
        """What else must hold at each start."""

    def run(self, disk: PowerDisk) -> Progress | None:
        """What the service manager and the updater do at a start. None when the power went."""
        node = self.node
        node.disk = disk
        try:
            node.boot()
            release = node.machine.running["agent"]
            assert release in (node.old.name, node.new.name)
            assert node.line.is_valid(release)
            self.settled()
            journals = node.journals.open_all()
            return drive(journals[0] if journals else self.begin(), node.target(), Quiet())
        except PowerCut:
            return None
        finally:
            node.close()

    def reboot(self, disk: PowerDisk, chosen: int) -> None:
        state = new_folder(self.place) / "s"
        disk.reboot(state, lambda n: keeps(chosen, n))
        before = self.node
        self.node = Node(state, install=False)
        self.node.clock.now, self.node.clock.boot = 0.1, before.clock.boot + "+"
        (state / "run").mkdir(exist_ok=True)
        self._settle()
        assert not list(state.glob("journal/*.unreadable"))


class ForcedPower(Power):
    """The release is there and runs, and comes once more through the channel: it is sound all the time."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, bad=False)
        put(self.node.line, self.node.new)
        self.node.line.activate(self.node.new.name, fallback=self.node.old.name)
        bring(self.node)

    def begin(self) -> Journal:
        release, line = self.node.new.release, self.node.line
        return self.node.journals.begin(
            Begin(
                "tx-1", "agent", release.version, release.digest, "node/new.tar.gz", line.current(),
                line.previous(), "wish", 6, "native",
            )
        )  # fmt: skip

    def settled(self) -> None:
        assert self.node.machine.running["agent"] == self.node.new.name


def calls_of_a_plain_run(power: Power) -> int:
    disk = PowerDisk(power.node.layout.state)
    assert power.run(disk) is not None
    return disk.calls


def update(power: Power, cuts: list[tuple[int, float, bool, int]]) -> None:
    bad = power.bad
    for cut, inside, zeros, chosen in cuts:
        disk = PowerDisk(power.node.layout.state, cut, inside, zeros)
        power.run(disk)
        power.reboot(disk, chosen)
    end = power.run(PowerDisk(power.node.layout.state))
    node = power.node
    assert end is not None
    assert end.finished
    assert node.line.current() == (node.old if bad else node.new).name, end.reason
    assert node.machine.running["agent"] == node.line.current()
    assert node.line.is_valid(node.line.current())
    assert trials.read(node.line) is None
    assert end.state.value == ("reverted" if bad else "confirmed")


@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
@pytest.mark.parametrize(
    "chosen", [0, 2**48 - 1, 0x5555_5555_5555], ids=["all lost", "all kept", "every other"]
)
def test_an_update_survives_a_cut_at_every_call(place: Path, bad: bool, chosen: int) -> None:
    for cut in range(calls_of_a_plain_run(Power(place, bad))):
        update(Power(place, bad), [(cut, 0.5 if cut % 2 else 1.0, bool(cut % 3), chosen)])


@pytest.mark.parametrize(
    "chosen", [0, 2**48 - 1, 0x5555_5555_5555], ids=["all lost", "all kept", "every other"]
)
def test_a_forced_release_is_sound_after_a_cut_at_every_call(place: Path, chosen: int) -> None:
    calls = calls_of_a_plain_run(ForcedPower(place))
    assert calls > 40
    for cut in range(calls):
        update(ForcedPower(place), [(cut, 0.5 if cut % 2 else 1.0, bool(cut % 3), chosen)])


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 90), insides, st.booleans(), bits), min_size=1, max_size=2),
    st.booleans(),
)
def test_an_update_survives_cuts_anywhere_and_during_recovery(
    place: Path, cuts: list[tuple[int, float, bool, int]], bad: bool
) -> None:
    update(Power(place, bad), cuts)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 90), insides, st.booleans(), bits), min_size=1, max_size=2))
def test_a_forced_release_is_sound_after_cuts_anywhere(
    place: Path, cuts: list[tuple[int, float, bool, int]]
) -> None:
    update(ForcedPower(place), cuts)
