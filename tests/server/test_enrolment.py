"""Who becomes a node, who does not, and how a node gets its next certificate."""

from __future__ import annotations

import sqlite3
import ssl

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.server.world import Node, World, make_csr


def fresh(world: World, name: str) -> Node:
    return Node(world, world.folder / "nodes" / name)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_token_makes_a_node_of_its_group(world: World) -> None:
    node = fresh(world, "good")
    answer = node.enrol(world.token("blue"))
    assert answer.status_code == 200
    assert answer.json()["group"] == "blue"
    certificate = x509.load_pem_x509_certificate(answer.json()["certificate"].encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [f"instar://node/{node.id}"]
    assert world.node(node.id)["state"] == "never-seen"


def test_a_used_up_token_enrols_nobody_else(world: World) -> None:
    token = world.token()
    assert fresh(world, "first").enrol(token).status_code == 200
    assert code(fresh(world, "second").enrol(token)) == (403, "token-used-up")


def test_the_same_key_and_token_again_give_the_same_node(world: World) -> None:
    """The answer may get lost on the way."""
    token, node = world.token(), fresh(world, "again")
    first = node.enrol(token).json()["node"]
    assert node.enrol(token).json()["node"] == first


def test_an_expired_token_enrols_nobody(world: World) -> None:
    token = world.token(lifetime_s=3600)
    with sqlite3.connect(world.layout.database, timeout=60) as database:
        database.execute("UPDATE enrolment_tokens SET expires = 1 WHERE uses_left = 1 AND uses = 1")
    assert code(fresh(world, "late").enrol(token)) == (403, "token-expired")


def test_an_unknown_or_deleted_token_enrols_nobody(world: World) -> None:
    assert code(fresh(world, "unknown").enrol("nonsense")) == (403, "token-unknown")
    with world.api() as api:
        made = api.post("/tokens", json={"group": "default"}).json()
        assert api.delete(f"/tokens/{made['id']}").status_code == 200
    assert code(fresh(world, "deleted").enrol(made["token"])) == (403, "token-unknown")


@pytest.mark.parametrize("csr", ["", "rubbish", "x" * 20_000])
def test_a_bad_csr_uses_nothing(world: World, csr: str) -> None:
    token = world.token()
    assert code(fresh(world, f"csr{len(csr)}").enrol(token, csr)) == (400, "bad-csr")
    assert fresh(world, f"csr-good{len(csr)}").enrol(token).status_code == 200


def test_a_csr_with_a_weak_or_foreign_key_is_refused(world: World) -> None:
    weak = make_csr(rsa.generate_private_key(65537, 2048))
    assert code(fresh(world, "rsa").enrol(world.token(), weak)) == (400, "bad-csr")
    good = make_csr(ec.generate_private_key(ec.SECP256R1()))
    lines = good.splitlines()
    lines[2] = lines[2][:10] + ("A" if lines[2][10] != "A" else "B") + lines[2][11:]
    assert code(fresh(world, "altered").enrol(world.token(), "\n".join(lines))) == (400, "bad-csr")


def test_renewal_gives_a_new_certificate_and_the_old_one_stays_good(world: World) -> None:
    node = world.new_node()
    with node.http() as http:
        answer = http.post("/v1/renew", json={"v": 1, "csr": make_csr(node.key)})
        assert answer.status_code == 200
        assert http.get("/v1/node/wanted").status_code == 200
    before = node.serial
    (node.folder / "cert.pem").write_text(answer.json()["certificate"])
    assert node.serial != before
    with node.http() as http:
        assert http.get("/v1/node/wanted").json()["node"] == node.id


def test_without_a_certificate_only_enrolment_is_served(world: World) -> None:
    context = ssl.create_default_context(cafile=str(world.layout.ca / "ca.pem"))
    with httpx.Client(
        base_url=fresh(world, "none").base, verify=context, trust_env=False, timeout=60
    ) as http:
        for path in ("/v1/node/wanted", "/v1/metadata/timestamp.json", "/v1/channel", "/nowhere"):
            assert code(http.get(path)) == (401, "no-certificate")


def test_a_certificate_of_another_ca_does_not_pass_the_handshake(world: World) -> None:
    node = fresh(world, "stranger")
    stranger = ec.generate_private_key(ec.SECP256R1())
    import time

    from instar_server.ca import FleetCA

    ca = FleetCA.create(node.folder / "ca", time.time())
    node.id = "n-" + "0" * 16
    pem = ca.issue_node(node.id, node.key.public_key(), time.time(), 3600).pem
    (node.folder / "cert.pem").write_text(pem)
    assert stranger is not node.key
    with node.http() as http, pytest.raises(httpx.TransportError):
        http.get("/v1/node/wanted")


def test_a_certificate_of_our_ca_that_was_never_issued_is_refused(world: World) -> None:
    """Somebody restored an old copy of the CA's key."""
    import time

    from instar_server.ca import FleetCA

    node = fresh(world, "forged")
    pem = (
        FleetCA.load(world.layout.ca)
        .issue_node("n-" + "a" * 16, node.key.public_key(), time.time(), 3600)
        .pem
    )
    (node.folder / "cert.pem").write_text(pem)
    with node.http() as http:
        assert code(http.get("/v1/node/wanted")) == (403, "certificate-unknown")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"v":2,"token":"x","csr":"y"}', b'{"v":1,"token":7,"csr":"y"}', b"[" * 50_000],
)
def test_a_bad_body_is_named(world: World, body: bytes) -> None:
    context = ssl.create_default_context(cafile=str(world.layout.ca / "ca.pem"))
    with httpx.Client(verify=context, trust_env=False, timeout=60) as http:
        answer = http.post(f"https://127.0.0.1:{world.ports['gateway_port']}/v1/enrol", content=body)
    assert code(answer) == (400, "bad-body")


def test_a_body_over_the_limit_is_refused(world: World) -> None:
    context = ssl.create_default_context(cafile=str(world.layout.ca / "ca.pem"))
    with httpx.Client(verify=context, trust_env=False, timeout=60) as http:
        answer = http.post(f"https://127.0.0.1:{world.ports['gateway_port']}/v1/enrol", content=b"x" * 70_000)
    assert code(answer) == (413, "body-too-large")
