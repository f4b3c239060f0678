"""What is refused before a byte is written: slots, variables and the EFI system partition stay as they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from instar.core.errors import ServerUnreachable
from instar.core.settings import OsSettings
from instar.core.transaction import State
from instar.engine.driver import drive
from instar.engine.target import Failed, NotNow
from instar.host.records import read_quarantine
from instar.targets.kit import TrustedTarget
from tests.node.boot.test_disks import read_only
from tests.node.slots.images import Image
from tests.node.slots.system import System, reason
from tests.node.world import Quiet


@pytest.fixture
def strange(memory: Path, images: tuple[Image, ...], request: pytest.FixtureRequest) -> Iterator[System]:
    """What is on offer is 1.3.0, with the particulars of the test."""
    made = System(memory / "s", images[0], Image(memory, "1.3.0", 5, **request.param))
    made.power_on()
    yield made
    made.close()


def refused(system: System, code: str, **more: object) -> None:
    before = system.everything()
    records = system.records()
    progress = system.update("reboot", "tx-9", **more)
    assert (progress.state, reason(progress)) == (State.REVERTED, code)
    assert system.everything() == before
    assert system.records() == records
    assert system.downs == []
    assert list(system.layout.staging.iterdir()) == []


@pytest.mark.parametrize("strange", [{"compatible": ("other board",)}], indirect=True)
def test_bundle_for_other_hardware(strange: System) -> None:
    refused(strange, "wrong-hardware")


@pytest.mark.parametrize("strange", [{"arch": "riscv64"}], indirect=True)
def test_bundle_for_another_architecture(strange: System) -> None:
    refused(strange, "wrong-hardware")


@pytest.mark.parametrize("strange", [{"min_version": "1.0.1"}], indirect=True)
def test_bundle_that_needs_a_newer_system(strange: System) -> None:
    refused(strange, "too-old-system")
    assert not read_quarantine(strange.layout.quarantine)


@pytest.mark.parametrize("strange", [{"min_version": "1.0.0"}], indirect=True)
def test_system_that_is_just_new_enough_is_taken(strange: System) -> None:
    assert strange.update("none").state is State.CONFIRMED


@pytest.mark.parametrize("strange", [{"size": 600 << 10}], indirect=True)
def test_bundle_for_a_larger_slot(strange: System) -> None:
    refused(strange, "slot-too-small")


def test_bundle_that_is_older_than_allowed(system: System) -> None:
    system.settings = OsSettings(min_bundle_version="1.1.1")
    refused(system, "too-old-bundle")
    assert not read_quarantine(system.layout.quarantine)
    system.settings = OsSettings(min_bundle_version="1.1.0")
    assert system.update("none").state is State.CONFIRMED


def test_system_that_runs_already(system: System) -> None:
    system.record("a", system.new, "good", cold_boot_seen=True)
    refused(system, "already-running")


def test_second_update_while_one_is_on_trial(system: System) -> None:
    """The engine does one at a time; a journal that was lost must not open the way back to be overwritten."""
    system.record("a", system.old, "trial")
    system.begin("reboot", "tx-9")
    target, journal = system.target(), system.journals.open_all()[-1]
    before = system.everything()
    with pytest.raises(Failed) as error:
        target.stage(journal.progress, journal)
    assert (error.value.reason.code, error.value.blame) == ("on-trial", False)
    assert system.everything() == before


def test_trial_whose_journal_was_lost_does_not_block_for_ever(system: System) -> None:
    system.record("a", system.old, "trial")
    system.start()
    assert (system.records()["a"].state, system.records()["a"].why) == (
        "unknown", "the journal of its trial was lost",
    )  # fmt: skip
    assert system.update().state is State.CONFIRMED


def test_slot_that_is_the_way_back_of_a_system_that_only_kexec_has_started(
    system: System, images: tuple[Image, ...]
) -> None:
    system.update("kexec")
    system.downs.clear()
    system.offer(images[2])
    refused(system, "cold-boot-not-seen")
    assert not read_quarantine(system.layout.quarantine)


def test_operator_may_override_that(system: System, images: tuple[Image, ...]) -> None:
    system.update("kexec")
    system.offer(images[2])
    progress = system.update("kexec", "tx-2", override=True)
    assert (progress.state, system.version, system.running) == (State.CONFIRMED, "1.2.0", "a")
    reasons = [record.reason.code for record in system.journals.open_all()[1].records if record.reason]
    assert "overridden" in reasons
    system.power_on()
    assert system.version == "1.2.0"


def test_altered_manifest(system: System) -> None:
    data = bytearray(system.new.bundle.read_bytes())
    data[data.index(b'"lab"') + 1] ^= 1
    system.source_file.path = system.folder / "altered"
    system.source_file.path.write_bytes(data)
    refused(system, "altered-bundle")


def test_manifest_of_another_version_than_is_signed(system: System) -> None:
    built = system.new.built
    custom = {**built.custom, "version": "1.1.1"}
    system.trusted_target = lambda *_: TrustedTarget("/b", built.length, built.sha256, custom)  # type: ignore[method-assign]
    refused(system, "wish-differs", version="1.1.1")


def test_wish_for_something_else_than_is_signed(system: System) -> None:
    refused(system, "wish-differs", digest="0" * 96)


def test_file_that_is_no_bundle(system: System) -> None:
    system.source_file.path = system.folder / "page"
    system.source_file.path.write_bytes(b"<html>" * 100)
    refused(system, "bad-bundle")


def test_partition_without_room_for_the_images(system: System) -> None:
    system.room = Path("/proc")  # no bytes at all
    refused(system, "esp-full")


def test_partition_that_is_read_only(system: System) -> None:
    system.room = read_only()
    refused(system, "mounted-read-only")


def test_running_slot_that_has_no_kernel_image_to_come_back_to(system: System) -> None:
    system.boot.kernel("a").unlink()
    before = system.slots["b"].device.read_bytes()
    progress = system.update()
    assert (progress.state, reason(progress)) == (State.REVERTED, "no-kernel-image")
    assert system.slots["b"].device.read_bytes() == before


def test_source_that_never_answers_is_given_up(system: System) -> None:
    def silent(url: str) -> tuple[object, str]:
        raise ServerUnreachable("server-unreachable", f"cannot reach {url}")

    system.elsewhere = silent  # type: ignore[method-assign, assignment]
    system.begin("none", source="https://typo.example/b")
    (journal,) = system.journals.open_all()
    with pytest.raises(NotNow):
        drive(journal, system.target(), Quiet())
    system.clock.sleep(3001.0)
    progress = drive(journal, system.target(), Quiet())
    assert (progress.state, reason(progress)) == (State.REVERTED, "server-unreachable")


def test_altered_chunk_leaves_a_slot_that_is_not_bootable(system: System) -> None:
    data = bytearray(system.new.bundle.read_bytes())
    data[-100] ^= 1
    system.source_file.path = system.folder / "altered"
    system.source_file.path.write_bytes(data)
    progress = system.update()
    assert (progress.state, reason(progress)) == (State.REVERTED, "altered-chunk")
    assert not system.boot.kernel("b").exists()
    assert system.records()["b"].state == "writing"
    system.power_on()
    assert system.version == "1.0.0"


def test_begin_says_what_an_older_release_need_not_know(system: System) -> None:
    plain = system.begin("reboot")
    assert "source" not in plain.as_data()
    assert "override" not in plain.as_data()
    said = replace(plain, source="https://h/x", override=True).as_data()
    assert (said["source"], said["override"]) == ("https://h/x", True)
    first = (system.layout.journal / "tx-1.journal").read_bytes().splitlines()[0]
    assert json.loads(first[9:])["data"]["mode"] == "reboot"
