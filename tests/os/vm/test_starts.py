"""How the lab's system comes up: by entries, by the fallback, under Secure Boot, under systemd-boot, by kexec."""

from __future__ import annotations

import pytest

from tests.os.vm import oracles
from tests.os.vm.world import Machine, X

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-starts")]


def test_a_machine_enrols_and_says_hello(machine: Machine) -> None:
    machine.start()
    node = machine.world.server.api.get(f"/nodes/{machine.id}")
    assert node["agent"]["version"] == "1.0.0", node
    assert machine.versions() == [f"{X} firmware"]

    machine.power_off()
    assert "LAB down" in machine.vm.lines()[-2:], machine.words()
    esp = oracles.Esp(machine.disk)
    assert esp.kernel("EFI/instar/a.efi").version == X
    assert oracles.holds(machine.disk, "a", machine.world.image(X).root)
