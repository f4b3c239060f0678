"""Certificates of operators: who gets one, and what is in it."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from instar_server.ca import FleetCA
from tests.server.test_ctl import ctl, data
from tests.server.world import World

DAY_S = 86400.0


def uses(certificate: x509.Certificate) -> set[x509.ObjectIdentifier]:
    return set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def uris(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def test_what_the_authority_gives_out(tmp_path: Path) -> None:
    authority, key = (
        FleetCA.create(tmp_path / "ca", 1e9),
        ec.generate_private_key(ec.SECP256R1()).public_key(),
    )
    operator = x509.load_pem_x509_certificate(authority.issue_operator("ada", key, 1e9, DAY_S).pem.encode())
    node = x509.load_pem_x509_certificate(
        authority.issue_node("n-0123456789abcdef", key, 1e9, DAY_S).pem.encode()
    )
    assert (uris(operator), uses(operator)) == (["instar://operator/ada"], {ExtendedKeyUsageOID.CLIENT_AUTH})
    assert uris(node) == ["instar://node/n-0123456789abcdef"]
    assert uses(node) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    for certificate in (operator, node):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert len(names) == 1, "nobody may take it for a host's"
        assert not list(certificate.subject)
        assert certificate.not_valid_after_utc.timestamp() == 1e9 + DAY_S


def test_an_admin_has_one_made_for_somebody(world: World, tmp_path: Path) -> None:
    out = tmp_path / "ada"
    made = data(world, "operator", "issue", "ada", "--out", str(out))
    assert stat.S_IMODE((out / "key.pem").stat().st_mode) == 0o600
    assert (out / "ca.pem").read_bytes() == (world.layout.ca / "ca.pem").read_bytes()
    certificate = x509.load_pem_x509_certificate((out / "cert.pem").read_bytes())
    key = serialization.load_pem_private_key((out / "key.pem").read_bytes(), None)
    assert certificate.public_key() == key.public_key()
    assert uris(certificate) == ["instar://operator/ada"]
    authority = x509.load_pem_x509_certificate((out / "ca.pem").read_bytes())
    certificate.verify_directly_issued_by(authority)
    left_s = certificate.not_valid_after_utc.timestamp() - time.time()
    assert abs(left_s - 30 * DAY_S) < 60
    assert made["not_after"] == certificate.not_valid_after_utc.timestamp()
    log = (world.folder / "server.log").read_text()
    assert f"operator certificate {made['serial']} made for ada" in log
    again = ctl(world, "operator", "issue", "ada", "--out", str(out))
    assert (again.exit_code, "already-there" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"csr": "nonsense"}, 400, "bad-csr"),
        ({"csr": "x" * 20_000}, 422, "bad-request"),
        ({"name": "../ada"}, 422, "bad-request"),
        ({"name": "Ada L"}, 422, "bad-request"),
        ({"name": ""}, 422, "bad-request"),
        ({"lifetime_s": 366 * DAY_S}, 422, "bad-request"),
        ({"lifetime_s": 1}, 422, "bad-request"),
        ({"days": 3}, 422, "bad-request"),
    ],
)
def test_what_is_refused(world: World, change: dict[str, object], status: int, code: str) -> None:
    with world.api() as api:
        answer = api.post("/operators", json={"name": "ada", "csr": "x", **change})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("role", ["viewer", "operator"])
def test_only_an_admin_may(world: World, tmp_path: Path, role: str) -> None:
    token = data(world, "api-tokens", "create", "--role", role)["token"]
    file = tmp_path / "token"
    file.write_text(token)
    out = tmp_path / "out"
    said = ctl(world, "operator", "issue", "ada", "--out", str(out), INSTARCTL_TOKEN_FILE=str(file))
    assert (said.exit_code, "role-too-low" in said.stderr) == (6, True)
    assert not (out / "key.pem").exists()


def test_an_operators_certificate_is_none_for_the_gateway(world: World, tmp_path: Path) -> None:
    import ssl

    out = tmp_path / "ada"
    data(world, "operator", "issue", "ada", "--out", str(out))
    context = ssl.create_default_context(cafile=str(out / "ca.pem"))
    context.load_cert_chain(str(out / "cert.pem"), str(out / "key.pem"))
    address = f"https://127.0.0.1:{world.ports['gateway_port']}/v1/node/wanted"
    answer = httpx.get(address, verify=context, trust_env=False, timeout=60)
    assert (answer.status_code, json.loads(answer.content)["error"]["code"]) == (403, "not-a-node")
