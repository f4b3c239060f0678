"""A system update from its wish to its end, through reboots, kexec, panics, hangs, and cuts at every place."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.core.journal import Progress, Reason
from instar.core.transaction import State
from instar.host import points
from instar.host.records import read_quarantine
from instar.targets.kit import Verdict
from tests.node.slots.system import Image, System


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, Image]:
    folder = tmp_path_factory.mktemp("images")
    return Image(folder, "1.0.0", 2), Image(folder, "1.1.0", 3)


@pytest.fixture
def system(tmp_path: Path, images: tuple[Image, Image]) -> Iterator[System]:
    made = System(tmp_path, *images)
    yield made
    made.close()


def update(system: System, mode: str = "reboot") -> Progress:
    system.begin(mode)
    return system.go_on()


def reason(progress: Progress) -> str:
    return progress.reason.code if progress.reason else ""


@pytest.mark.parametrize("mode", ["reboot", "kexec"])
def test_node_moves_to_the_new_system(system: System, mode: str) -> None:
    assert update(system, mode).state is State.CONFIRMED
    assert (system.version, system.running, system.downs) == ("1.1.0", "b", [mode])
    record = system.records()["b"]
    assert (record.state, record.booted_by) == ("good", "firmware" if mode == "reboot" else "kexec")
    system.power_on()
    assert system.version == "1.1.0"  # a cold boot comes back to it
    assert system.machine.firmware.state().order == ("b", "a")


def test_kexec_is_no_proof_of_a_cold_boot(system: System) -> None:
    update(system, "kexec")
    assert not system.records()["b"].cold_boot_seen
    assert system.records()["b"].why == "confirmed, cold boot not seen"
    system.power_on()
    system.target().cold_boot_seen()
    assert system.records()["b"].cold_boot_seen
    assert system.records()["b"].why == ""


def test_installed_only_changes_nothing_that_starts(system: System) -> None:
    assert update(system, "none").state is State.CONFIRMED
    assert system.downs == []
    assert system.records()["b"].state == "installed"
    system.power_on()
    assert system.version == "1.0.0"


def test_running_slot_is_never_written(system: System) -> None:
    before = system.slots["a"].device.read_bytes()
    update(system)
    assert system.slots["a"].device.read_bytes() == before


@pytest.mark.parametrize("mode", ["reboot", "kexec"])
def test_system_that_panics_is_left_by_itself(system: System, mode: str) -> None:
    system.panics = {"1.1.0"}
    progress = update(system, mode)
    assert (progress.state, reason(progress)) == (State.REVERTED, "fell-back")
    assert system.version == "1.0.0"
    assert system.records()["b"].state == "bad"
    assert read_quarantine(system.layout.quarantine)
    system.power_on()
    assert (system.version, system.machine.firmware.state().order[0]) == ("1.0.0", "a")


@pytest.mark.parametrize("mode", ["reboot", "kexec"])
def test_system_whose_agent_never_speaks_is_reverted(system: System, mode: str) -> None:
    system.broken = {"1.1.0"}
    progress = update(system, mode)
    assert (progress.state, reason(progress)) == (State.REVERTED, "lease-lapsed")
    assert system.version == "1.0.0"
    assert system.downs == [mode, "reboot"]
    system.power_on()
    assert system.version == "1.0.0"


def test_server_that_says_no_is_obeyed(system: System) -> None:
    system.verdict_said = Verdict("fail", Reason("wrong", "no"))
    progress = update(system)
    assert (progress.state, reason(progress), system.version) == (State.REVERTED, "wrong", "1.0.0")


def test_kexec_that_is_refused_becomes_a_reboot(system: System) -> None:
    system.kexec_refused = True
    progress = update(system, "kexec")
    assert (progress.state, system.downs, system.version) == (State.CONFIRMED, ["reboot"], "1.1.0")
    assert system.records()["b"].booted_by == "firmware"


def test_bundle_for_other_hardware_is_refused_and_nothing_is_written(
    tmp_path: Path, images: tuple[Image, Image]
) -> None:
    system = System(tmp_path / "s", images[0], Image(tmp_path, "1.2.0", 4, hardware="other board"))
    before = system.slots["b"].device.read_bytes()
    progress = update(system)
    system.close()
    assert (progress.state, reason(progress)) == (State.REVERTED, "wrong-hardware")
    assert system.slots["b"].device.read_bytes() == before
    assert system.downs == []


def test_altered_bundle_is_refused_and_the_slot_is_not_bootable(
    tmp_path: Path, images: tuple[Image, Image]
) -> None:
    new = Image(tmp_path, "1.3.0", 5)
    data = bytearray(new.bundle.read_bytes())
    data[-100] ^= 1
    new.bundle.write_bytes(data)
    system = System(tmp_path / "s", images[0], new)
    progress = update(system)
    assert (progress.state, reason(progress)) == (State.REVERTED, "altered-chunk")
    assert not system.machine.firmware.kernel("b").exists()
    system.power_on()
    assert system.version == "1.0.0"
    system.close()


def test_lost_variables_after_an_update_start_what_was_confirmed(system: System) -> None:
    update(system)
    for path in system.machine.variables.folder.iterdir():
        path.unlink()
    system.power_on()
    assert system.version == "1.1.0"


def test_mounted_root_that_is_in_no_slot_stops_everything(system: System) -> None:
    system.running = ""
    with pytest.raises(MachineError) as error:
        system.target()._idle()
    assert error.value.code == "unknown-slot"


class Cut(BaseException):
    pass


class Cutter:
    """Cuts the power at one of the points, counted."""

    def __init__(self, cut_at: int) -> None:
        self.left, self.reached = cut_at, False

    def __call__(self, _point: str) -> None:
        self.left -= 1
        if self.left < 0:
            self.reached, points.listener = True, None
            raise Cut


@pytest.mark.parametrize("mode", ["reboot", "kexec"])
@pytest.mark.parametrize("fault", ["", "panics", "broken"])
def test_power_cut_at_every_point(memory: Path, images: tuple[Image, Image], mode: str, fault: str) -> None:
    """Whatever the point: the machine starts by itself, the transaction ends, and a cold boot comes to the same."""
    for cut_at in count():
        system = System(memory / f"{cut_at}", *images)
        if fault:
            setattr(system, fault, {"1.1.0"})
        system.begin(mode)
        points.listener = cutter = Cutter(cut_at)
        try:
            progress = system.go_on()
        except Cut:
            system.power_on()
            progress = system.go_on()
        finally:
            points.listener = None
            system.close()
        wanted = "1.0.0" if progress.state is State.REVERTED else "1.1.0"
        if fault:
            assert progress.state is State.REVERTED
        assert system.version == wanted
        system.power_on()
        assert system.version == wanted
        if not cutter.reached:
            assert cut_at > 20
            return
