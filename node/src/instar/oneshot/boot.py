"""`instar.pyz boot load --image FILE --slot a|b`, `boot unload`, `boot jump`: the kernel's calls around kexec.

A one-shot child, so that nobody who stays carries ctypes. `jump` syncs and goes into the loaded kernel at once.
One line of JSON on stdout: {"ok":true} or {"ok":false,"error":{"code","text"}}.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from pathlib import Path

from instar.core.errors import InstarError, MachineError
from instar.host.boot import kexec
from instar.host.boot.slots import NAMES

MAGIC, MAGIC2, KEXEC = 0xFEE1DEAD, 672274793, 0x45584543  # reboot(2)
REBOOT_CALLS = {"x86_64": 169, "aarch64": 142}


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    try:
        if options.do == "load":
            kexec.load(options.image, options.slot)
        elif options.do == "unload":
            kexec.unload()
        else:
            _jump()
    except InstarError as error:
        print(json.dumps({"ok": False, "error": error.as_json()}), flush=True)
        return error.exit_status
    print(json.dumps({"ok": True}), flush=True)
    return 0


def _jump() -> None:
    if not kexec.loaded():
        raise MachineError("kexec-refused", "cannot go into another kernel: none is loaded")
    number = REBOOT_CALLS.get(os.uname().machine)
    if number is None:
        raise MachineError("kexec-refused", f"cannot use kexec on {os.uname().machine}")
    os.sync()
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall(ctypes.c_long(number), ctypes.c_uint(MAGIC), MAGIC2, KEXEC, None)
    raise MachineError(
        "kexec-refused", f"cannot go into the loaded kernel: {os.strerror(ctypes.get_errno())}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="instar boot", description="The kernel's calls around kexec.")
    parser.add_argument("do", choices=("load", "unload", "jump"))
    parser.add_argument("--image", type=Path, help="a unified kernel image")
    parser.add_argument("--slot", choices=NAMES, default="a")
    return parser
