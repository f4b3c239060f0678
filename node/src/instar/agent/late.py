"""What the resident does not carry before it is needed: imported, made and run at its first use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Part(Protocol):
    async def run(self) -> None: ...


P = TypeVar("P", bound=Part)


class Late(Generic[P]):
    """`make` imports and makes the part. `made` is None before the first `need`."""

    def __init__(self, make: Callable[[], P]) -> None:
        self._make = make
        self._needed = asyncio.Event()
        self.made: P | None = None

    def need(self) -> P:
        """The part; from now on it runs. Raises what `make` raises."""
        if self.made is None:
            self.made = self._make()
            self._needed.set()
        return self.made

    async def run(self) -> None:
        """Until cancelled."""
        await self._needed.wait()
        await self.need().run()
