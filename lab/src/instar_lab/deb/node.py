"""The node's package: what an operator installs instead of a downloaded file. It brings the first release only."""

from __future__ import annotations

from pathlib import Path

from instar.cli.units import GUARD, PACKAGED, PACKAGED_STATE, filled
from instar.host.layout import Layout
from instar_lab.deb.tree import Tree
from instar_lab.program import build

PYTHON = "/usr/bin/python3"  # Debian's, whichever version it is


def node_package(program: build.Program, out: Path) -> Path:
    """Raises MachineError `no-package`."""
    tree = Tree("instar", "node")
    tree.put("usr/lib/instar/instar.pyz", program.data, 0o755)
    tree.put_own("instar", "usr/bin/instar", 0o755)
    units = str(PACKAGED).lstrip("/")
    for name, text in filled(Layout(PACKAGED_STATE), PYTHON).items():
        tree.put(f"{units}/{name}", text.encode())
    # In an image of the operating system, too, in which nobody has enabled anything.
    tree.link(f"{units}/multi-user.target.wants/{GUARD}", f"../{GUARD}")
    return tree.build(out, program.version, "all", {})
