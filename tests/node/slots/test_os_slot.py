"""A system update from its wish to its end: by reboot and by kexec, with systems that panic, hang or say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.core.journal import Reason
from instar.core.transaction import State
from instar.host.records import read_quarantine
from instar.targets.kit import Verdict
from instar.targets.slots.platform import SystemProgress
from tests.node.slots.images import Image
from tests.node.slots.system import System, reason


@pytest.mark.parametrize("mode", ["reboot", "kexec"])
def test_node_moves_to_the_new_system(system: System, mode: str) -> None:
    assert system.update(mode).state is State.CONFIRMED
    assert (system.version, system.running, system.downs) == ("1.1.0", "b", [mode])
    record = system.records()["b"]
    assert (record.state, record.booted_by) == ("good", "firmware" if mode == "reboot" else "kexec")
    system.power_on()
    system.start()
    assert system.version == "1.1.0"  # a cold boot comes back to it
    assert system.boot.state().order == ("b", "a")
    system.power_on()
    assert system.version == "1.1.0"


def test_same_under_a_loader_that_counts(memory: Path, images: tuple[Image, ...]) -> None:
    system = System(memory / "c", images[0], images[1], "counting")
    system.power_on()
    assert system.update("reboot").state is State.CONFIRMED
    assert (system.version, system.boot.kernel("b").name) == ("1.1.0", "instar-b.efi")
    assert system.boot.state().order == ("b", "a")
    system.close()


def test_installed_only_changes_nothing_that_starts(system: System) -> None:
    assert system.update("none").state is State.CONFIRMED
    assert system.downs == []
    assert system.records()["b"].state == "installed"
    assert system.boot.state().once == ""
    system.power_on()
    assert system.version == "1.0.0"


def test_running_slot_is_never_written(system: System) -> None:
    before = system.slots["a"].device.read_bytes()
    system.update()
    assert system.slots["a"].device.read_bytes() == before


@pytest.mark.parametrize("mode", ["reboot", "kexec"])
def test_system_that_panics_is_left_by_itself(system: System, mode: str) -> None:
    system.panics = {"1.1.0"}
    progress = system.update(mode)
    assert (progress.state, reason(progress)) == (State.REVERTED, "fell-back")
    assert system.version == "1.0.0"
    assert system.records()["b"].state == "bad"
    assert read_quarantine(system.layout.quarantine)
    system.power_on()
    assert (system.version, system.boot.state().order[0]) == ("1.0.0", "a")


@pytest.mark.parametrize("mode", ["reboot", "kexec"])
def test_system_whose_agent_never_speaks_is_reverted(system: System, mode: str) -> None:
    system.broken = {"1.1.0"}
    progress = system.update(mode)
    assert (progress.state, reason(progress)) == (State.REVERTED, "lease-lapsed")
    assert system.version == "1.0.0"
    assert system.downs == [mode, "reboot"]
    system.power_on()
    assert system.version == "1.0.0"


def test_server_that_says_no_is_obeyed(system: System) -> None:
    system.verdict_said = Verdict("fail", Reason("wrong", "no"))
    progress = system.update()
    assert (progress.state, reason(progress), system.version) == (State.REVERTED, "wrong", "1.0.0")


def test_server_out_of_reach_blames_nobody(system: System) -> None:
    system.verdict_said = Verdict("unreachable", Reason("server-unreachable", "no"))
    progress = system.update()
    assert (progress.state, reason(progress), system.version) == (State.REVERTED, "unconfirmed", "1.0.0")
    assert system.records()["b"].state == "installed"  # nothing is known against it
    assert not read_quarantine(system.layout.quarantine)


def test_kexec_that_is_refused_becomes_a_reboot(system: System) -> None:
    system.kexec_refused = True
    progress = system.update("kexec")
    assert (progress.state, system.downs, system.version) == (State.CONFIRMED, ["reboot"], "1.1.0")
    assert system.records()["b"].booted_by == "firmware"


def test_kexec_that_the_bundle_denies_becomes_a_reboot(memory: Path, images: tuple[Image, ...]) -> None:
    system = System(memory / "d", images[0], Image(memory, "1.3.0", 5, deny_kexec=("board",)))
    system.power_on()
    progress = system.update("kexec")
    assert (progress.state, system.downs) == (State.CONFIRMED, ["reboot"])
    system.close()


def test_machine_that_does_not_go_down_stays_as_it_is(system: System) -> None:
    target = system.target()
    stays = target.platform._replace(power=Stays(), kexec=system)
    system.target = lambda: type(target)(target.kit, stays)  # type: ignore[method-assign]
    progress = system.update("kexec")
    assert (progress.state, reason(progress), system.version) == (State.REVERTED, "not-down", "1.0.0")
    assert system.records()["b"].state == "installed"
    assert system.kexec_loaded is None  # an ordinary reboot must not go there
    assert system.boot.state().once == ""


class Stays:
    """A machine that never goes down."""

    def reboot(self) -> None:
        return

    def kexec(self) -> None:
        return


# --- what the firmware does meanwhile


@pytest.mark.parametrize("step", ["rehearse", "activate"])
def test_entries_lost_before_the_switch_are_made_again(system: System, step: str) -> None:
    system.begin()
    target, (journal,) = system.target(), system.journals.open_all()
    do = getattr(target, step)

    def lose_first(progress: object, notes: object) -> object:
        system.lose_variables()
        return do(progress, notes)

    setattr(target, step, lose_first)
    system.target = lambda: target  # type: ignore[method-assign]
    assert system.go_on().state is State.CONFIRMED
    assert (system.version, journal.path.is_file()) == ("1.1.0", True)


def test_entries_lost_on_the_way_down_leave_the_old_system(system: System) -> None:
    system.on_down = system.lose_variables
    progress = system.update()
    assert (progress.state, reason(progress), system.version) == (State.REVERTED, "fell-back", "1.0.0")
    system.on_down = lambda: None
    system.start()
    assert system.boot.state().drift == ()
    assert system.boot.state().order == ("a",) or system.boot.state().order[0] == "a"


def test_entries_lost_during_the_trial_are_made_again(system: System) -> None:
    def lose() -> None:
        if system.running == "b":
            system.clock.on_sleep = lambda: None
            system.lose_variables()

    system.clock.on_sleep = lose
    assert system.update().state is State.CONFIRMED
    assert system.boot.state().order == ("b", "a")
    system.power_on()
    assert system.version == "1.1.0"


def test_lost_variables_after_an_update_start_what_was_confirmed(system: System) -> None:
    system.update()
    system.lose_variables()
    system.power_on()
    assert system.version == "1.1.0"


def test_slot_that_is_overwritten_is_not_what_an_empty_firmware_starts(
    system: System, images: tuple[Image, ...]
) -> None:
    """The preferred slot B is not the one that runs: somebody chose A in the firmware's menu."""
    system.update()
    system.running = "a"
    system.offer(images[2])
    system.begin("none", "tx-2")
    target, journal = system.target(), system.journals.open_all()[-1]
    target.stage(journal.progress, journal)
    assert system.starts_without_variables()
    system.power_on()
    assert system.version == "1.0.0"


# --- kexec and the watchdog


@pytest.mark.parametrize(
    ("state", "parameter", "said"),
    [("active", "0", "runs"), ("active", "-1", "stops"), ("inactive", "-1", "none"), ("", "1", "stops")],
)
def test_fate_of_the_watchdog_is_noted(system: System, state: str, parameter: str, said: str) -> None:
    device = system.watchdog.devices / "watchdog0"
    device.mkdir(parents=True)
    if state:
        (device / "state").write_text(f"{state}\n")
    system.watchdog.parameter.write_text(f"{parameter}\n")
    system.watchdog.parameter.chmod(0o444)
    system.watchdog = system.watchdog._replace(parameter=ReadOnly(system.watchdog.parameter))
    progress = system.update("kexec")
    assert (progress.state, progress.data["watchdog"]) == (State.CONFIRMED, said)
    notes = [record.reason.code for record in system.journals.open_all()[0].records if record.reason]
    assert ("watchdog-stops" in notes) is (said == "stops")


class ReadOnly(type(Path())):  # type: ignore[misc]
    """As most kernels have it; root could write the plain file of this test."""

    def write_text(self, *_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")


def test_watchdog_is_kept_running_where_the_kernel_lets_it(system: System) -> None:
    (system.watchdog.devices / "watchdog0").mkdir(parents=True)
    system.watchdog.parameter.write_text("-1\n")
    assert system.update("kexec").data["watchdog"] == "runs"
    assert system.watchdog.parameter.read_text() == "0"


def test_no_watchdog_is_said_too(system: System) -> None:
    assert system.update("kexec").data["watchdog"] == "none"


# --- the progress


def test_progress_is_told_while_it_comes_and_while_it_is_read_back(system: System) -> None:
    system.update("none")
    size = len(system.new.root)
    whole = [told for told in system.told if told.done == size]
    assert [told[:2] for told in system.told] == [("tx-1", "b")] * len(system.told)
    assert len(whole) >= 2  # written, and read back
    assert max(told.fetched for told in system.told) > 0
    assert max(told.reused for told in system.told) > size // 3
    assert isinstance(whole[0], SystemProgress)


def test_bytes_of_an_operators_source_are_fetched_there(system: System) -> None:
    progress = system.update("none", source="https://elsewhere.example/b?x=1")
    assert progress.state is State.CONFIRMED
    assert system.asked == ["https://elsewhere.example/b?x=1"]


def test_mounted_root_that_is_in_no_slot_stops_everything(system: System) -> None:
    before = system.everything()
    system.running = ""
    system.begin()
    with pytest.raises(MachineError) as error:
        system.target().ledger.idle()
    assert error.value.code == "unknown-slot"
    progress = system.go_on()
    assert (progress.state, reason(progress)) == (State.REVERTED, "unknown-slot")
    assert system.everything() == before
