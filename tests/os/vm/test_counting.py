"""systemd-boot chooses: a system on trial has counted tries, and what has passed has none. On one machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.os.vm import oracles, stores
from tests.os.vm.falls import comes_back
from tests.os.vm.world import Machine, World, X, Y

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-counting")]

A, B, TRIED = "EFI/Linux/instar-a.efi", "EFI/Linux/instar-b.efi", "EFI/Linux/instar-b+1-1.efi"
SETTINGS = "loader/loader.conf"


def test_counted_tries(machines: Callable[..., Machine], world: World) -> None:
    machine = machines(world.image(X), counting=True)
    machine.start()
    one_that_panics_is_left(machine, world)
    one_that_comes_up_is_counted_no_more(machine, world)


def one_that_panics_is_left(machine: Machine, world: World) -> None:
    """The loader has taken one try off its name; the settings never named it, so the next boot is of the old one."""
    bad = world.broken("panics")
    order = machine.update_os(world.publish(bad), "reboot")
    machine.appears(bad.version)
    machine.wait("Kernel panic", since=machine.since)
    comes_back(machine, order, "fell-back")
    assert order["digest"] in machine.do("cat /data/instar/quarantine.json")
    system = machine.reported(lambda seen: seen["slots"]["b"]["state"] == "bad", "slot b that is bad")
    assert (system["backend"], system["running"]) == ("counting", "a"), system
    assert (system["boot"]["order"], system["boot"]["once"]) == (["a", "b"], ""), system
    assert system["boot"]["tries"] == {"b": 1}, system
    assert machine.versions() == [f"{X} firmware", f"{bad.version} firmware", f"{X} firmware"]
    machine.settle()

    esp = oracles.Esp(machine.disk)
    assert images(esp) == {A: X, TRIED: bad.version}
    assert preferred(esp) == "instar-a*"
    assert "LoaderEntryOneShot" not in oracles.Firmware.of(machine.vm.variables).names
    assert oracles.holds(machine.disk, "a", world.image(X).root)


def one_that_comes_up_is_counted_no_more(machine: Machine, world: World) -> None:
    y = world.image(Y)
    order = machine.update_os(world.publish(y), "reboot")
    machine.up(Y)
    assert machine.ended(order)["outcome"] == "confirmed"
    system = machine.reported(lambda seen: seen["slots"]["b"]["state"] == "good", "slot b that is good")
    assert (system["running"], system["boot"]["order"], system["boot"]["tries"]) == ("b", ["b", "a"], {}), (
        system
    )
    machine.power_off()
    esp = oracles.Esp(machine.disk)
    assert images(esp) == {A: X, B: Y}
    assert preferred(esp) == "instar-b*"
    assert oracles.holds(machine.disk, "b", y.root)


@pytest.mark.slow
def test_it_needs_no_variables(machines: Callable[..., Machine], world: World) -> None:
    """What is preferred stands on the disk."""
    machine = machines(world.image(X), counting=True)
    machine.start()
    order = machine.update_os(world.publish(world.image(Y)), "reboot")
    machine.up(Y)
    assert machine.ended(order)["outcome"] == "confirmed"
    machine.power_off()
    stores.lost(machine.vm.variables)
    machine.start(Y)
    system = machine.reported(lambda seen: seen["running"] == "b", "a node that runs slot b")
    assert system["boot"]["order"] == ["b", "a"], system
    machine.power_off()
    assert images(oracles.Esp(machine.disk)) == {A: X, B: Y}
    assert oracles.holds(machine.disk, "b", world.image(Y).root)


def images(esp: oracles.Esp) -> dict[str, str]:
    """Path -> version, of all in the loader's folder."""
    return {path: esp.kernel(path).version for path in esp.files() if path.startswith("EFI/Linux/")}


def preferred(esp: oracles.Esp) -> str:
    lines = [line.split() for line in esp.read(SETTINGS).decode().splitlines()]
    (found,) = [words[1] for words in lines if words[0] == "default"]
    return found
