"""Work that waits for the disk, beside the event loop: in a thread of its own, which ends with it.

A pool would keep its threads, and their memory, in a resident for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def aside(work: Callable[[], T]) -> T:
    """What `work` returns or raises. Cancelled, the caller goes on alone; the work goes on to its end.

    The thread does not hold up the end of the process: `work` must bear being killed at any point.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(give: Callable[[], None]) -> None:
        if not future.done():
            give()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is
            fault = error
            give = lambda: future.set_exception(fault)  # noqa: E731
        else:
            give = lambda: future.set_result(result)  # noqa: E731
        with contextlib.suppress(RuntimeError):  # the loop may be gone by now
            loop.call_soon_threadsafe(settle, give)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return await future
