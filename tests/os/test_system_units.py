"""What systemd lets the updater of a node with slots do, from the setting to its removal."""

from __future__ import annotations

import json

import pytest

from instar_lab import machine
from tests.node.system_host import disk_image
from tests.os.conftest import OLD
from tests.os.node import STATE, UPDATER, OsNode

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("containers")]

DROP_IN = f"/etc/systemd/system/{UPDATER}.d/instar-os.conf"
OS = '\n[os]\ndisk = "{disk}"\nesp = "/efi"\n'


def system(node: OsNode) -> dict[str, object]:
    return dict(json.loads(node.cli("status", "--json"))["system"])


def test_updater_of_a_node_with_slots_may_use_them_and_starts_without_them_too(node: OsNode) -> None:
    node.set_up(OLD)
    root = node.container.root
    assert not (root / DROP_IN[1:]).exists()
    with node.layout.config.open("a") as file:
        file.write(OS.format(disk=f"{STATE}/disk.img"))
    node.cli("start")
    assert (root / DROP_IN[1:]).exists()
    bounds = {name: node.container.property(UPDATER, name) for name in
              ("PrivateDevices", "ReadWritePaths", "CapabilityBoundingSet", "SystemCallFilter", "ProtectSystem")}  # fmt: skip
    assert (bounds["PrivateDevices"], bounds["ProtectSystem"]) == ("no", "strict")
    assert set(bounds["ReadWritePaths"].split()) == {STATE, "-/efi"}
    assert set(bounds["CapabilityBoundingSet"].split()) == {
        "cap_dac_override",
        "cap_linux_immutable",
        "cap_sys_boot",
        "cap_sys_rawio",
    }
    assert "kexec_file_load" in bounds["SystemCallFilter"].split()
    # There is no /efi yet, and no disk: the updater answers all the same, and says so.
    assert node.status()["lines"]["updater"]["answers"], node.words()
    assert "expected the EFI system partition" in str(system(node)["fault"])

    # A loader that counts needs no EFI variables, which a container has not.
    for path in ("efi/loader/loader.conf", "efi/EFI/systemd/systemd-bootx64.efi"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("timeout 0\n")
    for slot in "ab":
        (root / "efi/EFI/Linux").mkdir(parents=True, exist_ok=True)
        (root / f"efi/EFI/Linux/instar-{slot}.efi").write_bytes(b"x")
    (node.layout.state / "disk.img").write_bytes(disk_image())
    node.container.do("systemctl", "restart", UPDATER)
    machine.wait_for(
        lambda: "default instar-" in (root / "efi/loader/loader.conf").read_text(),
        "the updater's own word in the EFI system partition", 20.0, node.words,
    )  # fmt: skip
    assert system(node)["fault"] == ""

    text = node.layout.config.read_text()
    node.layout.config.write_text(text.replace("disk = ", "# disk = "))
    node.cli("start")
    assert not (root / DROP_IN[1:]).exists()
    assert node.container.property(UPDATER, "PrivateDevices") == "yes"


def test_uninstalling_takes_it_along(node: OsNode) -> None:
    node.set_up(OLD)
    with node.layout.config.open("a") as file:
        file.write(OS.format(disk="/dev/nvme9n1"))
    node.cli("start")
    assert (node.container.root / DROP_IN[1:]).exists()
    node.cli("uninstall")
    assert not (node.container.root / DROP_IN[1:]).parent.exists()
