"""The Debian packages: `make deb`, or `python -m instar_lab.deb`.

    instar_<v>_all.deb              a node: the program, /usr/bin/instar, systemd units for /var/lib/instar
    instar-server_<v>_<arch>.deb    a server with the Python packages of requirements/server.txt, and instarctl

Control files, maintainer scripts and the server's unit are in packaging/; the node's units are those that
`instar install` writes (instar.cli.unit_files). The same source gives the same bytes.
"""

from instar_lab.deb.node import node_package
from instar_lab.deb.server import server_package

__all__ = ["node_package", "server_package"]
