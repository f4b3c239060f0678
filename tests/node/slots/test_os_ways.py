"""Updates that write no image: the proof of a cold boot, the way back, and a node's first system."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.core.transaction import State
from instar.host.records import read_quarantine
from instar.targets.slots.records import write_records
from tests.node.slots.images import Image
from tests.node.slots.system import System, reason


@pytest.fixture
def unseen(system: System) -> System:
    """1.1.0 runs, confirmed, and only kexec has started it."""
    assert system.update("kexec").state is State.CONFIRMED
    system.downs.clear()
    return system


# --- after kexec


def test_kexec_is_no_proof_of_a_cold_boot(unseen: System) -> None:
    record = unseen.records()["b"]
    assert (record.cold_boot_seen, record.why) == (False, "confirmed, cold boot not seen")
    assert unseen.boot.state().order == ("a", "b")
    assert unseen.boot.state().once == "b"
    unseen.power_on()
    unseen.start()
    record = unseen.records()["b"]
    assert (unseen.version, record.cold_boot_seen, record.why) == ("1.1.0", True, "")
    assert unseen.boot.state().order == ("b", "a")


def test_system_that_kexec_starts_and_the_firmware_does_not_is_left_for_good(unseen: System) -> None:
    unseen.panics_cold = {"1.1.0"}
    unseen.power_on()
    unseen.start()
    assert unseen.version == "1.0.0"
    assert (unseen.records()["b"].state, unseen.records()["a"].state) == ("bad", "good")
    (entry,) = read_quarantine(unseen.layout.quarantine).values()
    assert (entry.version, entry.reason.code, entry.count) == ("1.1.0", "fell-back", 1)
    for _ in range(3):
        unseen.power_on()
        unseen.start()
        assert unseen.version == "1.0.0"
    assert [entry.count for entry in read_quarantine(unseen.layout.quarantine).values()] == [1]


def test_firmware_that_loses_the_entries_meanwhile_is_told_again(unseen: System) -> None:
    unseen.lose_variables()
    unseen.start()
    assert unseen.boot.state().once == "b"
    unseen.power_on()
    assert unseen.version == "1.1.0"


def test_cold_boot_that_was_seen_once_is_not_asked_for_again(unseen: System) -> None:
    unseen.power_on()
    unseen.start()
    unseen.begin_rollback()
    unseen.go_on()
    assert unseen.update("kexec", "tx-3").state is State.CONFIRMED
    assert unseen.records()["b"].cold_boot_seen
    assert unseen.boot.state().order == ("b", "a")


# --- the proof


def test_proof_of_a_cold_boot(unseen: System) -> None:
    before = unseen.slots["a"].device.read_bytes(), unseen.slots["b"].device.read_bytes()
    unseen.begin_cold_boot()
    progress = unseen.go_on()
    assert (progress.state, unseen.version, unseen.downs) == (State.CONFIRMED, "1.1.0", ["reboot"])
    record = unseen.records()["b"]
    assert (record.state, record.cold_boot_seen, record.booted_by) == ("good", True, "firmware")
    assert unseen.boot.state().order == ("b", "a")
    assert (unseen.slots["a"].device.read_bytes(), unseen.slots["b"].device.read_bytes()) == before


@pytest.mark.parametrize(("fault", "code"), [("panics_cold", "fell-back"), ("broken_cold", "lease-lapsed")])
def test_proof_that_fails_goes_back_for_good(unseen: System, fault: str, code: str) -> None:
    setattr(unseen, fault, {"1.1.0"})
    unseen.begin_cold_boot()
    progress = unseen.go_on()
    assert (progress.state, reason(progress), unseen.version) == (State.REVERTED, code, "1.0.0")
    assert unseen.records()["b"].state == "bad"
    assert [entry.version for entry in read_quarantine(unseen.layout.quarantine).values()] == ["1.1.0"]
    unseen.power_on()
    assert unseen.version == "1.0.0"


def test_proof_needs_something_to_fall_back_to(unseen: System) -> None:
    unseen.boot.kernel("a").unlink()
    before = unseen.everything()
    unseen.begin_cold_boot()
    progress = unseen.go_on()
    assert (progress.state, reason(progress)) == (State.REVERTED, "nothing-to-fall-back-to")
    assert unseen.downs == []
    assert unseen.everything() == before


def test_proof_looks_at_what_runs_first(unseen: System) -> None:
    kernel = unseen.boot.kernel("b")
    kernel.write_bytes(kernel.read_bytes()[:-1] + b"x")
    unseen.begin_cold_boot()
    progress = unseen.go_on()
    assert (progress.state, reason(progress), unseen.downs) == (State.REVERTED, "not-as-written", [])
    assert unseen.records()["b"].state == "good"


def test_proof_that_cannot_begin_leaves_the_node_where_it_is(unseen: System) -> None:
    """The machine does not go down: nothing is known against the system that runs."""
    target = unseen.target()
    unseen.target = lambda: type(target)(target.kit, target.platform._replace(power=Stays()))  # type: ignore[method-assign]
    unseen.begin_cold_boot()
    progress = unseen.go_on()
    assert (progress.state, reason(progress), unseen.version) == (State.REVERTED, "not-down", "1.1.0")
    record = unseen.records()["b"]
    assert (record.state, record.cold_boot_seen) == ("good", False)
    assert unseen.boot.state().once == "b"


class Stays:
    def reboot(self) -> None:
        return

    kexec = reboot


# --- the way back


def test_rollback_goes_to_the_other_slot_and_writes_nothing(system: System) -> None:
    system.update()
    before = system.slots["a"].device.read_bytes(), system.slots["b"].device.read_bytes()
    system.begin_rollback()
    progress = system.go_on()
    assert (progress.state, system.version, system.running) == (State.CONFIRMED, "1.0.0", "a")
    assert (system.slots["a"].device.read_bytes(), system.slots["b"].device.read_bytes()) == before
    assert (system.records()["a"].state, system.records()["b"].state) == ("good", "good")
    system.power_on()
    assert system.version == "1.0.0"


def test_rollback_that_fails_ends_where_it_began(system: System) -> None:
    system.update()
    system.panics = {"1.0.0"}
    system.begin_rollback()
    progress = system.go_on()
    assert (progress.state, reason(progress), system.version) == (State.REVERTED, "fell-back", "1.1.0")
    assert system.records()["a"].state == "bad"
    assert not read_quarantine(system.layout.quarantine)
    assert not system.target().usable("a")


@pytest.mark.parametrize("state", ["writing", "bad", "trial"])
def test_rollback_to_a_slot_that_is_not_whole_is_refused(system: System, state: str) -> None:
    system.update("none")
    record = system.records()["b"]._replace(state=state)
    write_records(system.layout.state / "os/slots.json", {**system.records(), "b": record})
    before = system.everything()
    target = system.target()
    assert not target.usable("b")
    system.begin_rollback()
    progress = system.go_on()
    assert (progress.state, reason(progress), system.downs) == (State.REVERTED, "nothing-to-roll-back-to", [])
    assert system.everything() == before


def test_rollback_to_a_slot_that_was_damaged_is_refused(system: System) -> None:
    system.update()
    with system.slots["a"].device.open("r+b") as file:
        file.write(b"damaged")
    system.begin_rollback()
    system.downs.clear()
    progress = system.go_on()
    assert (progress.state, reason(progress), system.downs) == (State.REVERTED, "not-as-written", [])
    assert [system.records()[slot].state for slot in "ab"] == ["bad", "good"]


# --- a node's first system


@pytest.fixture
def first(system: System) -> System:
    """Nobody has written about slot A, where 1.0.0 runs."""
    (system.layout.state / "os/slots.json").unlink()
    system.os_release.write_text('NAME="Lab"\nVERSION_ID="12"\nIMAGE_VERSION="1.0.0"\n')
    return system


def test_first_system_is_noted_and_stays_unknown(first: System) -> None:
    first.start()
    record = first.records()["a"]
    assert (record.version, record.state, record.name) == ("1.0.0", "unknown", f"1.0.0-{record.digest[:12]}")
    first.start()
    assert first.records()["a"] == record


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("VERSION_ID=12\n", "12.0.0"),
        ('VERSION_ID="24.04"\n', "24.4.0"),
        ("IMAGE_VERSION=2.3.4-rc1\nVERSION_ID=1\n", "2.3.4-rc1"),
        ("IMAGE_VERSION=nightly\nVERSION_ID=7\n", "7.0.0"),
        ("ID=debian\n", ""),
        ("VERSION_ID=²\n", ""),
    ],
)
def test_version_of_the_first_system(first: System, said: str, version: str) -> None:
    first.os_release.write_text(said)
    first.start()
    assert first.records()["a"].version == version


def test_first_system_can_be_updated_and_gone_back_to(first: System) -> None:
    assert first.update().state is State.CONFIRMED
    assert first.version == "1.1.0"
    first.begin_rollback()
    assert first.go_on().state is State.CONFIRMED
    assert (first.version, first.records()["a"].state) == ("1.0.0", "good")


def test_first_system_serves_as_the_way_back_of_a_proof(first: System) -> None:
    first.update("kexec")
    first.begin_cold_boot()
    assert first.go_on().state is State.CONFIRMED
    assert first.records()["b"].cold_boot_seen


def test_first_system_whose_kernel_image_was_changed_is_not_gone_back_to(first: System) -> None:
    first.update()
    kernel = first.boot.kernel("a")
    kernel.write_bytes(kernel.read_bytes() + b"x")
    first.begin_rollback()
    progress = first.go_on()
    assert (progress.state, reason(progress), first.version) == (State.REVERTED, "not-as-written", "1.1.0")


def test_node_without_os_release_can_still_be_updated(first: System) -> None:
    first.os_release.unlink()
    assert first.update().state is State.CONFIRMED
    assert not first.target().usable("a")  # nobody knows what it is


def test_records_that_cannot_be_read_now_stay_where_they_are(system: System) -> None:
    path = system.layout.state / "os/slots.json"
    kept = path.rename(path.with_suffix(".kept"))
    path.mkdir()  # as a disk that fails, it opens and does not read
    with pytest.raises(MachineError):
        system.records()
    path.rmdir()
    kept.rename(path)
    assert system.records()["a"].state == "good"


def test_records_that_cannot_be_read_are_set_aside(system: System) -> None:
    path: Path = system.layout.state / "os/slots.json"
    path.write_text("{")
    assert system.update().state is State.CONFIRMED
    assert path.with_suffix(".unreadable").exists()


def test_loaders_own_default_does_not_undo_an_update(memory: Path, images: tuple[Image, ...]) -> None:
    """Somebody chose the old slot in the loader's menu, for good."""
    system = System(memory / "s", images[0], images[1], "counting")
    system.power_on()
    system.loader_variables.write("LoaderEntryDefault", "instar-a.efi\0".encode("utf-16-le"))
    assert system.update().state is State.CONFIRMED
    system.power_on()
    system.start()
    assert (system.version, system.boot.state().order, system.boot.state().drift) == ("1.1.0", ("b", "a"), ())
    system.close()
