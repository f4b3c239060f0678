"""What the core asks of the server: all through one pinned certificate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from instar.core.errors import MachineError, ServerUnreachable, TrustError
from instar.core.settings import NetworkSettings
from instar.host.layout import Layout
from instar.host.program import Program
from instar.host.transport import Endpoint, Transport
from instar.rescue.order import Order
from instar.targets.kit import TrustedTarget, Verdict
from instar.updater.client import ServerClient

DIFFERS = "certificate-differs"
ROLE = "cli"  # in Instar-Program: the core is no updater, and must not be shown as the node's


class PinnedSource:
    """A source whose wrong certificate is no passing fault: it is not tried again."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @contextlib.contextmanager
    def stream(
        self, path: str, start: int, stop: int | None = None
    ) -> Iterator[tuple[bool, Iterator[bytes]]]:
        try:
            with self._transport.stream(path, start, stop) as found:
                yield found
        except ServerUnreachable as error:
            raise final(error) from error


class RescueServer:
    """Implements `instar.targets.kit.Server`. `channel` is the server of the control channel; the archive
    may lie elsewhere, and then its metadata do, too. One thread at a time."""

    def __init__(
        self, layout: Layout, program: Program, order: Order, server: str, net: NetworkSettings
    ) -> None:
        def client(address: str) -> ServerClient:
            certificate, key = layout.certificate, layout.key
            header, pin = program.header(ROLE), order.pin
            endpoint = Endpoint(address, layout.ca, certificate, key, net.proxy, header, pin=pin)
            return ServerClient(Transport(endpoint), layout, program)

        channel = order.server or server
        self._client, self.channel = client, client(channel)
        self.artifacts = client(order.source) if order.source not in ("", channel) else self.channel
        self._known: dict[str, TrustedTarget] = {}

    def another(self) -> ServerClient:
        """A client of the channel's server for another thread."""
        return self._client(self.channel.source().endpoint.server)

    def trusted_target(self, target: str, metadata: Path | None = None) -> TrustedTarget:
        """Asked once in a core's life: what was verified a moment ago is not verified again. A parcel's
        `metadata` are not taken: the core brings what it installs."""
        if target not in self._known:
            self._known[target] = self._verified(target)
        return self._known[target]

    def _verified(self, target: str) -> TrustedTarget:
        try:
            return self.artifacts.trusted_target(target)
        except ServerUnreachable as error:
            if self.artifacts is self.channel or error.code == DIFFERS:
                raise final(error) from error
        try:
            return self.channel.trusted_target(target)
        except ServerUnreachable as error:
            raise final(error) from error

    def verdict(self, line: str, phase: str, tx: str, digest: str, wait_s: float) -> Verdict:
        return self.channel.verdict(line, phase, tx, digest, wait_s)

    def source(self) -> PinnedSource:
        return PinnedSource(self.artifacts.source())

    def elsewhere(self, url: str) -> tuple[PinnedSource, str]:
        raise MachineError("no-source", f"cannot fetch {url}: a recovery core installs no system")


def final(error: ServerUnreachable) -> ServerUnreachable | TrustError:
    """Another certificate than the channel's is refused for good: it would differ next time, too."""
    return TrustError(error.code, error.text) if error.code == DIFFERS else error
