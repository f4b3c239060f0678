"""No room: on the EFI system partition, then in the firmware's store of variables. Both are refused for what they are,
the old system goes on, and once there is room the same update works. And what a power cut has left is swept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.os.vm import crossed, oracles
from tests.os.vm.untouched import everything, untouched
from tests.os.vm.world import Machine, World, X, Y

pytestmark = pytest.mark.os

A, B = "EFI/instar/a.efi", "EFI/instar/b.efi"
LEFT = f"{B}.new"  # what a write that was cut off leaves
CROSSED = f"{A}.new"  # a name that a rename which was cut off leaves: on the clusters of the new one
FILLED = "Filler"
# These run in the guest.
FILL_PARTITION = """\
with open("/efi/filler", "wb") as file:
    try:
        while True:
            file.write(bytes(1 << 20))
    except OSError:
        pass
"""
# To the last byte that the firmware, or the kernel before it, gives away. It takes 5 KB of room for
# itself, below which it writes nothing; so large variables first, and then small ones.
FILL = f"""\
import itertools, os
numbers, made = itertools.count(), 0
for size in (4096, 512, 32):
    for number in numbers:
        path = f"/sys/firmware/efi/efivars/{FILLED}{{number:04d}}-12345678-1234-1234-1234-123456789abc"
        try:
            with open(path, "wb", buffering=0) as file:
                file.write(bytes([7, 0, 0, 0]) + bytes(size))
        except OSError as error:
            print(size, error)
            break
        made += 1
print(made)
"""
EMPTY = f"""\
import os
folder = "/sys/firmware/efi/efivars/"
names = [name for name in os.listdir(folder) if not name.startswith("{FILLED}")]
print(*(name for name in names if os.stat(folder + name).st_size <= 4))
"""
CLEAR = f"""\
import fcntl, os, struct
for name in os.listdir("/sys/firmware/efi/efivars"):
    if name.startswith("{FILLED}"):
        path = "/sys/firmware/efi/efivars/" + name
        with open(path, "rb") as file:
            fcntl.ioctl(file, 0x40086602, struct.pack("<l", 0))
        os.unlink(path)
"""


@pytest.mark.xdist_group("vm-x")
def test_full_partition_then_full_store_then_room(on_x: Machine, world: World) -> None:
    bundle = world.publish(world.image(Y))
    a_full_partition(on_x, bundle)
    a_full_store(on_x, bundle)
    now_there_is_room(on_x, world, bundle)


def a_full_partition(machine: Machine, bundle: str) -> None:
    """Refused before anything is written."""
    python(machine, FILL_PARTITION)
    with untouched(machine):
        order = machine.update_os(bundle, "reboot")
        ended = machine.ended(order)
        assert (ended["outcome"], ended["code"]) == ("unavailable", "esp-full"), ended
        assert "free bytes" in ended["text"], ended
    machine.do("rm /efi/filler && sync")


def a_full_store(machine: Machine, bundle: str) -> None:
    """Found out while it is rehearsed: the slot is written by then, and no boot entry is."""
    said = python(machine, FILL)
    assert "No space left" in said, said
    before = everything(machine)["variables"]
    assert len([name for name in before if name.startswith(FILLED)]) > 10, said
    order = machine.update_os(bundle, "reboot")
    ended = machine.ended(order)
    assert (ended["outcome"], ended["code"]) == ("unavailable", "variables-full"), ended
    assert "store is full" in ended["text"], ended
    assert machine.versions() == []
    assert everything(machine)["variables"] == before
    assert python(machine, EMPTY).split() == [], "an empty variable was left"


def now_there_is_room(machine: Machine, world: World, bundle: str) -> None:
    y = world.image(Y)
    python(machine, CLEAR)
    machine.reboot(X)  # firmware gives the room of what was removed back when it starts
    ended = machine.ended(machine.update_os(bundle, "none"))
    assert ended["outcome"] == "installed, not active", ended
    machine.settle()
    firmware, esp = oracles.Firmware.of(machine.vm.variables), oracles.Esp(machine.disk)
    assert (firmware.slots[0], firmware.once) == ("a", ""), firmware
    assert not [name for name in firmware.names if name.startswith(FILLED)]
    for path, version in ((A, X), (B, Y), (oracles.FALLBACK, X)):
        assert esp.read(path) == world.image(version).kernel.read_bytes(), path
    assert not [path for path in esp.files() if path.endswith(".new")]
    assert oracles.holds(machine.disk, "b", y.root)


@pytest.mark.slow
@pytest.mark.xdist_group("vm-left")
def test_what_a_power_cut_left_is_swept(machine: Machine, world: World, tmp_path: Path) -> None:
    """For it takes the room of an image: but not the clusters of the system that runs."""
    machine.start()
    machine.power_off()
    left = tmp_path / "left"
    for size, path in ((1 << 20, LEFT), (0, CROSSED)):
        left.write_bytes(bytes(size))
        machine.put(path, left)
    crossed.on_the_clusters_of(machine.disk, CROSSED, A)
    machine.start(X)
    system = machine.reported(lambda seen: "cut off" in str(seen["boot"]["drift"]), "a swept partition")
    drift = "; ".join(system["boot"]["drift"])
    assert "removed b.efi.new" in drift, drift
    assert "set a.efi.new aside as a.efi.new.shared1: it lies on the clusters of a.efi" in drift, drift
    files = everything(machine)["esp"]
    assert LEFT not in files
    assert CROSSED not in files
    machine.reboot(X)  # nothing of it is in memory any more
    machine.do("cat /efi/EFI/instar/a.efi >/dev/null && cp /etc/passwd /efi/writable && rm /efi/writable")
    assert oracles.Esp(machine.disk).read(A) == world.image(X).kernel.read_bytes()
    order = machine.update_os(world.publish(world.image(Y)), "reboot")
    machine.up(Y)
    assert machine.ended(order)["outcome"] == "confirmed"
    machine.power_off()
    assert oracles.Firmware.of(machine.vm.variables).slots == "ba"


def python(machine: Machine, program: str) -> str:
    return machine.do(f"python3 -I -S - <<'END'\n{program}END\n", 120.0)
