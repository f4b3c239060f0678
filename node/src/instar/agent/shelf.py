"""The modules on this node's disk. (Skeleton.)"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from instar.host.layout import Layout

if TYPE_CHECKING:
    from instar.trust.module import ModuleManifest


class Module(NamedTuple):
    """A release of a module that was checked. `folder` is absolute."""

    manifest: ModuleManifest
    folder: Path
    digest: str
    release: str


class Shelf:
    """`fetch_command` is `instar.pyz fetch-module --state DIR [--proxy …]`; what to fetch is appended."""

    def __init__(self, layout: Layout, fetch_command: list[str]) -> None:
        self._layout, self._fetch_command = layout, fetch_command

    def find(self, name: str, version: str, digest: str) -> Module | None:
        """The module with exactly this digest, checked file by file; None when it is not on the disk."""
        raise NotImplementedError

    async def fetch(self, name: str, version: str, digest: str, target: str, within_s: float) -> Module:
        """Have it fetched by a child, one for each digest however many wait. Raises InstarError."""
        raise NotImplementedError

    def services(self) -> dict[str, Module]:
        """Modules with a `current` link, checked; a damaged one is logged and left out."""
        raise NotImplementedError
