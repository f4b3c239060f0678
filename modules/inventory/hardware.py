"""What the machine is made of: processors, memory, board, disks, network cards. From /proc and /sys."""

from __future__ import annotations

import os
from typing import Any

from files import line, names, number, pairs, text

MIB = 1 << 20
SECTOR = 512  # bytes; /sys counts disks in these whatever the disk says
BOARD = ("sys_vendor", "product_name", "product_version", "product_serial", "product_uuid", "board_vendor",
         "board_name", "board_serial", "bios_vendor", "bios_version", "bios_date", "chassis_type")  # fmt: skip
NO_ANSWER = ("", "none", "not specified", "default string", "to be filled by o.e.m.", "system serial number")
MOST_DISKS = 500


def look(root: str = "") -> dict[str, Any]:
    return {
        "machine": os.uname().machine,
        "cpu": _cpu(root),
        "memory": _memory(root),
        "board": _board(root),
        "disks": _disks(root),
        "cards": _cards(root),
    }


def _cpu(root: str) -> dict[str, Any]:
    """ARM, RISC-V and POWER spell some names of /proc/cpuinfo in their own ways."""
    content = text(f"{root}/proc/cpuinfo", 8 * MIB)
    blocks = [pairs(block, ":") for block in content.split("\n\n") if block.strip()]
    first = blocks[0] if blocks else {}
    model = next(
        (first[key] for key in ("model name", "Model", "cpu", "uarch", "Processor") if key in first), ""
    )
    packages = {block["physical id"] for block in blocks if "physical id" in block}
    cores = {(block.get("physical id"), block["core id"]) for block in blocks if "core id" in block}
    logical = sum(1 for block in blocks if "processor" in block)
    return {
        "model": model or line(f"{root}/proc/device-tree/model"),
        "logical": logical or (os.cpu_count() or 0),
        "cores": len(cores) or None,
        "packages": len(packages) or None,
    }


def _memory(root: str) -> dict[str, Any]:
    """Whole MiB: the kernel's own count moves by pages."""
    found = pairs(text(f"{root}/proc/meminfo"), ":")
    return {
        "total_mib": _kib(found.get("MemTotal", "")) // 1024,
        "swap_mib": _kib(found.get("SwapTotal", "")) // 1024,
    }


def _kib(value: str) -> int:
    word = value.split(" ", maxsplit=1)[0]
    return int(word) if word.isdecimal() else 0


def _board(root: str) -> dict[str, str]:
    """What the maker wrote, where it may be read (serial numbers need root) and says something."""
    found = {name: line(f"{root}/sys/class/dmi/id/{name}") for name in BOARD}
    found = {name: value[:200] for name, value in found.items() if value.lower() not in NO_ANSWER}
    if not found and (model := line(f"{root}/proc/device-tree/model")):
        found = {"product_name": model[:200]}
    return found


def _disks(root: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in names(f"{root}/sys/block")[: 4 * MOST_DISKS]:
        folder = f"{root}/sys/block/{name}"
        size = number(f"{folder}/size") * SECTOR
        if not size or name.startswith(("loop", "ram", "zram", "dm-", "md")) or len(found) >= MOST_DISKS:
            continue
        found[name] = {
            "size": size,
            "model": line(f"{folder}/device/model")[:100],
            "serial": (line(f"{folder}/device/serial") or line(f"{folder}/serial"))[:100],
            "spins": number(f"{folder}/queue/rotational") == 1,
            "removable": number(f"{folder}/removable") == 1,
        }
    return found


def _cards(root: str) -> dict[str, dict[str, Any]]:
    """Network interfaces that have a device behind them."""
    found = {}
    for name in names(f"{root}/sys/class/net")[:MOST_DISKS]:
        folder = f"{root}/sys/class/net/{name}"
        if os.path.exists(f"{folder}/device"):
            try:
                driver = os.path.basename(os.readlink(f"{folder}/device/driver"))
            except OSError:
                driver = ""
            found[name] = {"mac": line(f"{folder}/address"), "driver": driver}
    return found
