"""A system that kexec starts and the firmware does not: it is left for good when the machine comes up cold."""

from __future__ import annotations

from pathlib import Path

import pefile
import pytest

from instar_lab.osimage.variant import Image
from tests.os.vm import oracles
from tests.os.vm.falls import is_kept_out, starts_from_a
from tests.os.vm.world import Machine, World, X, Y

pytestmark = [pytest.mark.os, pytest.mark.slow, pytest.mark.xdist_group("vm-cold-boots")]
UNSEEN = "confirmed, cold boot not seen"
LOAD_ERROR = bytes.fromhex("48b80100000000000080c3")  # mov rax, EFI_LOAD_ERROR; ret


def refused_by_firmware(image: Image, folder: Path) -> Image:
    """The same system, whose kernel image ends at once when the firmware starts it. kexec takes the sections."""
    data = bytearray(image.kernel.read_bytes())
    found = pefile.PE(data=bytes(data), fast_load=True)
    entry = found.get_offset_from_rva(found.OPTIONAL_HEADER.AddressOfEntryPoint)
    data[entry : entry + len(LOAD_ERROR)] = LOAD_ERROR
    kernel = folder / "refused.efi"
    kernel.write_bytes(data)
    return image._replace(kernel=kernel)


def test_what_only_kexec_starts_is_left(machine: Machine, world: World, tmp_path: Path) -> None:
    """Once by a proof that was ordered, once since the power went."""
    bundle = world.publish(refused_by_firmware(world.image(Y), tmp_path), name="kexec-only")
    machine.start()
    for power_goes in (False, True):
        order = machine.update_os(bundle, "kexec")
        machine.up(Y, "kexec")
        assert machine.ended(order)["outcome"] == UNSEEN
        if power_goes:
            machine.cut_power()
            assert oracles.Firmware.of(machine.vm.variables).once == "\\EFI\\instar\\b.efi"
            machine.start(X)
        else:
            machine.cold_boot()
            machine.up(X)
            machine.connected(order["ended"] or 0.0)
        is_kept_out(machine, order)
    ended = [
        entry for entry in machine.history() if entry["line"] == "os" and entry["reason_code"] == "fell-back"
    ]
    assert ended, machine.history()
    machine.power_off()
    starts_from_a(machine, world.image(X))

    machine.start()
    order = machine.update_os(world.publish(world.image(Y)), "reboot")
    machine.up(Y)
    assert machine.ended(order)["outcome"] == "confirmed"
    assert machine.versions()[-1] == f"{Y} firmware"
