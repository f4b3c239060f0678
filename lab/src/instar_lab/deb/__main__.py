"""`python -m instar_lab.deb`: build both packages, or one."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from instar.core.errors import InstarError
from instar.version import VERSION
from instar_lab.deb import node_package, server_package
from instar_lab.program import build


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make deb",
        description="Build the Debian packages. Needs dpkg-deb; the same source gives the same bytes.",
    )
    parser.add_argument("--version", default=VERSION, metavar="1.2.3", help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("dist"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--only", choices=("node", "server"), help="one of the two")
    options = parser.parse_args(argv)
    try:
        made = []
        if options.only != "server":
            made.append(node_package(build.build(options.version), options.out))
        if options.only != "node":
            made.append(server_package(options.version, options.out))
    except InstarError as error:
        print(f"make deb: {error}", file=sys.stderr)
        return error.exit_status
    for path in made:
        data = path.read_bytes()
        print(f"{path}: {len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
