"""The guard of a system on trial under real systemd, as the Debian package brings it into an image."""

from __future__ import annotations

import json

import pytest

from instar.cli.units import GUARD
from instar.core.errors import MachineError
from instar.oneshot.boot_guard import MOST
from instar.targets.slots.records import SlotRecord, write_records
from instar_lab import machine
from tests.os.conftest import OLD
from tests.os.packaged import WANTS, PackagedNode

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("containers")]

AT_ONCE = (("lease_s = 30.0", "lease_s = 1.0"), ("cap_s = 60.0", "cap_s = 1.0"))


def test_a_system_in_which_nobody_is_at_work_is_restarted_and_not_for_ever(packaged: PackagedNode) -> None:
    node = packaged
    node.set_up(OLD)
    assert node.container.property(GUARD, "ConditionResult") == "no"
    config = node.layout.config.read_text()
    for old, new in AT_ONCE:
        assert old in config
        config = config.replace(old, new)
    node.layout.config.write_text(f"{config}\n[os]\nguard_s = 0\n")
    for link in (node.container.root / WANTS[1:]).glob("*.wants/instar-*"):
        link.unlink()  # in the image of the new system nobody has enabled a unit

    is_down(node, "trial")
    heard(node, f"left alone: b 1.1.0 {'ab' * 6} 5 is undecided after {MOST} restarts")
    assert json.loads((node.layout.system / "guard.json").read_bytes())["restarts"] == MOST
    assert node.residents() == []

    is_down(node, "good")
    heard(node, "no trial is open in this system")


def is_down(node: PackagedNode, state: str) -> None:
    node.container.shut_down()
    tried = SlotRecord("1.1.0", "ab" * 48, state, since=5.0)
    write_records(node.layout.slots, {"a": SlotRecord("1.0.0", state="good"), "b": tried})


def heard(node: PackagedNode, words: str) -> None:
    """It comes up, and up again as often as it restarts, until the guard says that."""

    def said() -> bool:
        try:
            if node.container.down:
                node.container.boot()
            return any(words in line.text for line in node.container.journal(GUARD))
        except MachineError:  # it is on its way down
            return False

    machine.wait_for(said, f"{words!r} of the guard", 60.0, lambda: machine.tail(node.container.console))
