"""Certificates of operators: the right to use the API of nodes' updaters, for a while.

Nothing is kept of them: nodes have no list of revoked ones, so a certificate is good until it ends. Who had
one made, for whom and until when, is in the server's log and told to those who watch the fleet.
"""

from __future__ import annotations

import logging

from instar_server.bus.api import FLEET, Bus
from instar_server.ca import FleetCA, Issued, check_csr
from instar_server.services.ports import Now

log = logging.getLogger(__name__)


class Operators:
    def __init__(self, ca: FleetCA, bus: Bus, now: Now) -> None:
        self._ca, self._bus, self._now = ca, bus, now

    def issue(self, name: str, csr: str, lifetime_s: float, by: str) -> tuple[Issued, str]:
        """A certificate for `instar://operator/<name>`, and the CA's (PEM). `by` is the API token's id.

        Raises InputError `bad-csr`.
        """
        issued = self._ca.issue_operator(name, check_csr(csr), self._now(), lifetime_s)
        log.warning(
            "API token %s had operator certificate %s made for %s, good for %.1f days",
            by, issued.serial, name, lifetime_s / 86400,
        )  # fmt: skip
        told = {"kind": "operator-issued", "name": name, "serial": issued.serial}
        self._bus.publish(FLEET, {**told, "not_after": issued.not_after, "by": by})
        return issued, self._ca.pem
