"""A Debian 12 with real systemd as PID 1, or with other service managers, in less than a second.

    tree = make_tree(cache)              # once; about a minute, then it is reused
    with Container(tree, folder) as container:
        container.do("systemctl", "is-system-running")

Needs root and the Debian packages `debootstrap` and `systemd-container` on this machine. The container has
this machine's network: 127.0.0.1 is the same inside and outside.
"""

from instar_lab.container.box import Container, Journaled, why_not
from instar_lab.container.tree import OTHERS, SYSTEMD, Recipe, made_tree, make_tree

__all__ = ["OTHERS", "SYSTEMD", "Container", "Journaled", "Recipe", "made_tree", "make_tree", "why_not"]
