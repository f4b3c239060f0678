"""Certificates: when they are renewed, and that a kill between never leaves a pair that does not fit."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from instar.agent.certificate import validity
from instar.core.errors import InputError, MachineError
from instar.host.files import Disk
from instar.host.layout import Layout
from instar.oneshot.renew import put_pair
from instar.wire.messages import Refused, Welcome
from tests.agent.fleet import Authority, Place, Server, node_names


class Killed(BaseException):
    """Stands for the end of the process."""


class DyingDisk(Disk):
    """Ends the process before its n-th call that changes names."""

    def __init__(self, lives: int) -> None:
        self.lives = lives

    def _step(self) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise Killed

    def write_new(self, path: Path, data: bytes, mode: int) -> None:
        self._step()
        super().write_new(path, data, mode)

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        super().rename(old, new)

    def symlink(self, target: str, path: Path) -> None:
        self._step()
        super().symlink(target, path)


def fits(layout: Layout) -> bytes:
    """The certificate in use; raises when the key is another one's."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(layout.certificate, layout.key)
    return layout.certificate.read_bytes()


def enrolled(folder: Path, authority: Authority) -> Layout:
    layout = Layout(folder)
    layout.identity.mkdir(parents=True)
    certificate, key = authority.issue(node_names())
    layout.certificate.write_bytes(certificate)
    layout.key.write_bytes(key)
    layout.ca.write_bytes(authority.pem)
    return layout


def test_times_are_read_as_the_library_reads_them(authority: Authority) -> None:
    for age_s in (0, 86_400 * 365 * 30, -86_400 * 365 * 26):  # the 1990s, and 2050 with four-digit years
        pem, _ = authority.issue(node_names(), age_s=age_s)
        theirs = x509.load_pem_x509_certificate(pem)
        ours = validity(pem)
        assert ours.not_before == theirs.not_valid_before_utc.timestamp()
        assert ours.not_after == theirs.not_valid_after_utc.timestamp()


@pytest.mark.parametrize("cut", [0, 30, 200, 400])
def test_broken_certificates_are_refused(authority: Authority, cut: int) -> None:
    pem, _ = authority.issue(node_names())
    with pytest.raises(InputError):
        validity(pem[:cut])
    with pytest.raises(InputError):
        validity(pem[:40] + b"!!!!" + pem[60:])


def test_any_kill_leaves_a_pair_that_fits(tmp_path: Path, authority: Authority) -> None:
    kills = 0
    for lives in range(100):
        layout = enrolled(tmp_path / str(lives), authority)
        old = layout.certificate.read_bytes()
        certificate, key = authority.issue(node_names())
        try:
            put_pair(layout, key, certificate, DyingDisk(lives))
        except Killed:
            kills += 1
            assert fits(layout) in (old, certificate)
            put_pair(layout, key, certificate)  # the next try finishes
        else:
            assert fits(layout) == certificate
            break
        assert fits(layout) == certificate
    assert kills > 8


def test_old_pairs_are_collected(tmp_path: Path, authority: Authority) -> None:
    layout = enrolled(tmp_path, authority)
    for _ in range(4):
        certificate, key = authority.issue(node_names())
        put_pair(layout, key, certificate)
        assert fits(layout) == certificate
    assert sorted(os.listdir(layout.identity / "pairs")) == ["4", "5"]
    assert (layout.identity / "pairs" / "5" / "key.pem").stat().st_mode & 0o777 == 0o600


def test_a_pair_that_does_not_fit_is_not_used(tmp_path: Path, authority: Authority) -> None:
    layout = enrolled(tmp_path, authority)
    old = fits(layout)
    certificate, _ = authority.issue(node_names())
    _, key = authority.issue(node_names())
    with pytest.raises(MachineError):
        put_pair(layout, key, certificate)
    assert fits(layout) == old


async def test_the_agent_renews_in_time_and_uses_the_new_one(place: Place, server: Server) -> None:
    """Two thirds of its life are over, so the agent renews at once."""
    certificate, key = place.authority.issue(node_names(), life_s=3600, age_s=3000)
    place.layout.certificate.write_bytes(certificate)
    place.layout.key.write_bytes(key)
    agent = await place.start()
    connection = await server.connection()
    await agent.until_said("the certificate was renewed")
    assert server.renewals[0]["v"] == 1
    assert fits(place.layout) != certificate
    await connection.cut()
    await server.connection()  # with the new pair


async def test_a_lapsed_certificate_is_renewed_before_the_channel_is_tried(
    place: Place, server: Server
) -> None:
    """It was off for over a month."""
    put(place, life_s=30 * 86_400, age_s=40 * 86_400)
    agent = await place.start()
    await server.connection()
    assert (len(server.renewals), len(server.attempts), server.lapsed) == (1, 1, 0)
    assert "the certificate was renewed" in agent.said()


async def test_a_lapsed_certificate_is_tried_again_soon(place: Place, server: Server) -> None:
    put(place, life_s=30 * 86_400, age_s=40 * 86_400)
    server.renews = False
    agent = await place.start()
    await agent.until_said("(certificate-expired)")  # the channel was tried all the same
    assert (len(server.renewals), server.lapsed) == (1, 1)
    server.renews = True
    await server.connection(120.0)
    assert (len(server.renewals), server.lapsed) == (2, 1)


async def test_the_servers_word_that_it_has_lapsed_counts(place: Place, server: Server) -> None:
    """The clock of a machine without a battery stands where it was when that went off."""
    server.welcome = None
    agent = await place.start()
    connection = await server.connection()
    assert not server.renewals
    server.welcome = Welcome(1, "test", ping_s=5.0, health_s=30.0)
    await connection.send(Refused("certificate-expired", "it has run out", 1.0))
    await agent.until_said("the certificate was renewed")
    connection.over.set()
    await server.connection()


def put(place: Place, life_s: float, age_s: float) -> None:
    """Give the node a certificate of this age."""
    certificate, key = place.authority.issue(node_names(), life_s=life_s, age_s=age_s)
    place.layout.certificate.write_bytes(certificate)
    place.layout.key.write_bytes(key)


async def test_a_failed_renewal_is_said_and_changes_nothing(place: Place, server: Server) -> None:
    old = fits(place.layout)
    await server.stop()
    place.layout.run.mkdir()
    one_shot = await place.start(entry="renew")
    assert await one_shot.wait() == 5
    assert "cannot reach" in one_shot.said()
    assert fits(place.layout) == old
