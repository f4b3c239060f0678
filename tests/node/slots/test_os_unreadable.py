"""A running slot with a place that cannot be read: what it does not give is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.core.errors import MachineError
from instar.host.boot.slots import Slot
from instar.targets.os_slot import OsSlot
from instar.targets.slots.source import index
from instar.targets.slots.writer import Writer
from tests.node.slots.system import SLOT_BYTES, System
from tests.node.slots.test_writer import DECOMPRESS, World, made

__all__ = ["made"]  # a fixture
NO_READING = Path("/proc/self/mem")  # opens, and answers EIO: nothing is mapped at its beginning


def test_such_a_slot_opens_and_answers_with_an_error() -> None:
    with pytest.raises(MachineError) as error:
        index(Slot("a", NO_READING, 0, 1 << 20), 1 << 20)
    assert error.value.code == "disk-failed"
    with NO_READING.open("rb", buffering=0) as file, pytest.raises(OSError, match="Input/output error"):
        file.read(1)


@pytest.mark.parametrize("device", [NO_READING, Path("/proc/none")], ids=["bad place", "does not open"])
def test_chunk_that_cannot_be_read_is_fetched(
    tmp_path: Path, made: tuple[Path, object], device: Path
) -> None:
    world = World(tmp_path, *made)  # type: ignore[arg-type]
    running = world.slots[0]._replace(device=device)
    writer = Writer(world.head.bundle.image("root"), world.slots[1], running, world.local, DECOMPRESS)
    writer.write(0, world.frames, lambda _: None)
    world.check()
    assert (writer.reused, writer.fetched > len(world.new) // 2) == (0, True)


@pytest.mark.parametrize("manifest", ["kept", "not kept"])
def test_update_from_a_slot_that_cannot_be_read(system: System, manifest: str) -> None:
    if manifest == "not kept":  # its index is made by reading it
        (system.layout.state / "os/a.manifest").unlink()
    system.begin("none")
    made_of, (journal,) = system.target(), system.journals.unfinished()
    slots = {**system.slots, "a": Slot("a", NO_READING, 0, SLOT_BYTES)}
    target = OsSlot(made_of.kit, made_of.platform._replace(slots=slots))
    outcome = target.stage(journal.progress, journal)
    assert outcome.data["bytes"]["reused"] == 0
    assert system.slots["b"].device.read_bytes().startswith(system.new.root)
