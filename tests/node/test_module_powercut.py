"""Power cuts anywhere while a module comes, is replaced, is put back, or goes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instar.core.journal import Reason
from instar.engine.driver import drive
from instar.host import trials
from instar.targets.kit import Verdict
from tests.node.modules import ModuleNode
from tests.node.powercut import PowerCut, PowerDisk
from tests.node.test_powercut import MEMORY, bits, insides, keeps
from tests.node.world import Quiet

PARENT = str(MEMORY) if MEMORY.is_dir() else None
CASES = ["first", "first bad", "update", "update bad", "retire"]
LOST, KEPT, SOME = 0, 2**48 - 1, 0x5555_5555_5555


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="i-", dir=PARENT, ignore_cleanup_errors=True) as name:
        yield Path(name)


class Power:
    """A node whose power goes; what is left is started again in another folder."""

    def __init__(self, place: Path, case: str) -> None:
        self.place, self.case = place, case
        self.node = self._made(Path(tempfile.mkdtemp(dir=place)) / "s", install=True)
        if not case.startswith("first"):
            self.node.install(self.node.first)
        self.node.keep()

    def _made(self, state: Path, install: bool) -> ModuleNode:
        node = ModuleNode(state, install=install)
        if not self.case.startswith("first"):
            node.server.offer(node.second)
        if self.case.endswith("bad"):
            node.server.verdicts["trial"] = Verdict("fail", Reason("wrong-reply", "it was"))
        return node

    def run(self, disk: PowerDisk) -> str | None:
        """What agent and updater do at a start: the end of the transaction, '' for none; None when the power went."""
        node = self.node
        node.disk = disk
        try:
            node.boot()
            if self.case == "retire":
                node.module_target().sweep()
                if node.module.current():
                    node.module_target().retire()
                return ""
            journals = node.journals.open_all()
            journal = journals[0] if journals else node.begin_module(node.server.offered)
            return drive(journal, node.module_target(), Quiet()).state.value
        except PowerCut:
            return None
        finally:
            node.close()

    def reboot(self, disk: PowerDisk, chosen: int) -> None:
        state = Path(tempfile.mkdtemp(dir=self.place)) / "s"
        disk.reboot(state, lambda n: keeps(chosen, n))
        boot = self.node.clock.boot
        self.node = self._made(state, install=False)
        self.node.clock.now, self.node.clock.boot = 0.1, boot + "+"
        for folder in ("run", "staging", "journal"):
            (state / folder).mkdir(exist_ok=True)
        assert not list(state.glob("journal/*.unreadable"))


def play(place: Path, case: str, cuts: list[tuple[int, float, bool, int]]) -> int:
    """Play `case` through these cuts and then to its end; how many calls the last run made."""
    power = Power(place, case)
    for cut, inside, zeros, chosen in cuts:
        disk = PowerDisk(power.node.layout.state, cut, inside, zeros)
        power.run(disk)
        power.reboot(disk, chosen)
    last = PowerDisk(power.node.layout.state)
    end, node = power.run(last), power.node
    first, offered = node.first.name, node.server.offered.name
    wanted = {"first": offered, "first bad": "", "update": offered, "update bad": first, "retire": ""}[case]
    assert end == ("" if case == "retire" else "reverted" if case.endswith("bad") else "confirmed")
    assert node.module.current() == wanted == node.running
    if wanted:
        node.module.check(wanted)
    assert trials.read(node.module) is None
    assert (node.layout.module("demo.watch").data / "state.json").read_text() == '{"seen": 1}'
    return last.calls


@pytest.mark.parametrize("chosen", [LOST, KEPT, SOME], ids=["all lost", "all kept", "every other"])
@pytest.mark.parametrize("case", CASES)
def test_a_module_survives_a_cut_at_every_call(place: Path, case: str, chosen: int) -> None:
    for cut in range(play(place, case, [])):
        play(place, case, [(cut, 0.5 if cut % 2 else 1.0, bool(cut % 3), chosen)])


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 90), insides, st.booleans(), bits), min_size=1, max_size=2),
    st.sampled_from(CASES),
)
def test_a_module_survives_cuts_anywhere_and_during_recovery(
    place: Path, cuts: list[tuple[int, float, bool, int]], case: str
) -> None:
    play(place, case, cuts)
