"""What the server was heard to want, and what it is told when it is asked."""

from __future__ import annotations

from pathlib import Path

from instar.core import held
from instar.core.system import LINE as SYSTEM
from instar.core.wish import Wanted
from instar.host.records import read_held, write_held
from instar.updater.client import ServerClient


class Heard:
    """`trouble`: why the last try got no further, for the server. `anything`: whether it ever answered."""

    def __init__(self, client: ServerClient, file: Path) -> None:
        self._client, self._file = client, file
        self._generations: dict[str, int] = {}
        self.trouble = ""
        self.anything = False

    def ask(self) -> Wanted:
        """What the server wants; a newer wish ends what was held against older ones."""
        wanted = self._client.wanted(self.trouble)
        self.trouble, self.anything = "", True
        self._generations = {wish.line: wish.generation for wish in wanted.wishes}
        if wanted.system is not None:
            self._generations[SYSTEM] = wanted.system.generation
        before = read_held(self._file)
        left = held.heard(before, self._generations)
        if left != before:
            write_held(self._file, left)
        return wanted

    def generation(self, line: str) -> int:
        """Of the wish for this line as it was last heard; 0 for none."""
        return self._generations.get(line, 0)
