"""Fetch the release's archive: as long as is signed, resumed after cuts, and with the SHA-384 of the order.

The signed length is known before a byte is fetched, so nobody can fill the disk; what is signed is
compared with the bytes once more when they are staged.
"""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

from instar.core.backoff import Backoff
from instar.core.errors import ServerUnreachable, TrustError
from instar.core.settings import NetworkSettings
from instar.engine.fetch import Limits, fetch
from instar.host.disks import check_space
from instar.host.files import make_folder, remove_tree
from instar.host.layout import Layout
from instar.host.points import reach
from instar.rescue.order import Order
from instar.rescue.server import RescueServer
from instar.rescue.voice import Voice
from instar.targets.kit import TrustedTarget
from instar.targets.line import UNPACKED_TIMES

MOST_BAD = 3  # archives with another SHA-384, then it gives up
ASK_TRIES = 6  # for the signed metadata
FETCH_TRIES = 8  # cuts without a byte between them
FETCH_S = 600.0
CHUNK = 1 << 20


class Archives:
    """`<state>/rescue/<sha384, 24 digits>/archive`: kept over a kill, gone at a core's end."""

    def __init__(self, layout: Layout, order: Order) -> None:
        self._all = layout.rescue
        self._order = order
        self.folder = self._all / order.sha384[:24]
        self.path = self.folder / "archive"

    def clear(self, keep: bool = False) -> None:
        """Remove what cores have left; `keep`: but not what this one can go on from."""
        if not self._all.is_dir():
            return
        for path in self._all.iterdir():
            if not (keep and path == self.folder):
                remove_tree(path)

    def bring(self, server: RescueServer, network: NetworkSettings, voice: Voice) -> None:
        """The archive is there, and its SHA-384 fits, when this returns.

        Raises TrustError (`bad-hash` after MOST_BAD tries, `wish-differs`, and what `verify` says),
        ServerUnreachable, MachineError.
        """
        voice.progress("verify")
        signed = self._signed(server)
        make_folder(self.folder, 0o700)
        check_space(self.folder, signed.length * (1 + UNPACKED_TIMES))
        for bad in range(1, MOST_BAD + 1):
            self._fetch(server, signed.length, network, voice)
            reach("rescue:fetched")
            got = sha384_of(self.path)
            if got == self._order.sha384:
                voice.downloaded(got)
                return
            self.path.unlink()
            voice.progress("fetch", text=f"bad hash {bad} of {MOST_BAD}: SHA-384 {got[:16]}…")
        text = (
            f"cannot use {self._order.path}: expected SHA-384 {self._order.sha384}, {MOST_BAD} times another"
        )
        raise TrustError("bad-hash", text)

    def _signed(self, server: RescueServer) -> TrustedTarget:
        backoff = Backoff(1.0, 2.0, 20.0)
        for left in reversed(range(ASK_TRIES)):
            try:
                return server.trusted_target(self._order.target)
            except ServerUnreachable:
                if not left:
                    raise
            time.sleep(backoff.next(random.random()))
        raise AssertionError("the last try returns or raises")

    def _fetch(self, server: RescueServer, length: int, network: NetworkSettings, voice: Voice) -> None:
        limits = Limits(network.rate_bytes_s, FETCH_TRIES, FETCH_S)

        def told(have: int) -> None:
            voice.progress("fetch", 100.0 * have / length if length else 100.0)

        fetch(server.source(), self._order.path, self.path, length, limits, told)


def sha384_of(path: Path) -> str:
    digest = hashlib.sha384()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
