"""The fleet's certificate authority: who is the server, who is which node, who is an operator.

ECDSA P-256 throughout. A node certificate names its node only by the URI
`instar://node/<id>`; whatever a signing request asks for besides its key is not looked at.

A node is a server too: of its updater's API. Its certificate names no host, so that nobody can take it for
that of the fleet's server, which is looked for by its host name.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from instar.core.errors import InputError, MachineError
from instar_server.trust.files import make_folder, write_atomic

MAX_CSR = 16_384  # bytes
CA_DAYS, SERVER_DAYS, NODE_DAYS = 3650, 365, 30
BACKDATE = timedelta(minutes=5)  # a node whose clock is a little slow still accepts it

NodeKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate as PEM; `serial` is upper-case hexadecimal, `not_after` unix time."""

    pem: str
    serial: str
    not_after: float


class FleetCA:
    """Holds the CA's key. `create` makes one in a folder (key file 0600), `load` reads it back."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key, self._certificate = key, certificate
        self.pem = certificate.public_bytes(serialization.Encoding.PEM).decode()

    @classmethod
    def create(cls, folder: Path, now: float, name: str = "Instar fleet CA") -> FleetCA:
        """Make a new CA in `folder`. Raises MachineError `already-there` rather than overwrite one."""
        if (folder / "key.pem").exists():
            raise MachineError("already-there", f"cannot make a CA: {folder / 'key.pem'} exists")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        start = datetime.fromtimestamp(now, UTC)
        builder = (
            _builder(subject, subject, key.public_key(), start, timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        ca = cls(key, builder.sign(key, hashes.SHA256()))
        make_folder(folder)
        write_atomic(folder / "key.pem", _private_pem(key), 0o600)
        write_atomic(folder / "ca.pem", ca.pem.encode())
        return ca

    @classmethod
    def load(cls, folder: Path) -> FleetCA:
        try:
            key = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
            certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        except (OSError, ValueError) as error:
            raise MachineError("ca-unreadable", f"cannot read the CA in {folder}: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise MachineError("ca-unreadable", f"cannot use the CA in {folder}: expected an EC key")
        return cls(key, certificate)

    def issue_server(self, hosts: list[str], now: float, days: int = SERVER_DAYS) -> tuple[str, bytes]:
        """A server certificate for host names and IP addresses: (PEM, private key PEM)."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
        start = datetime.fromtimestamp(now, UTC)
        builder = (
            _builder(names, self._certificate.subject, key.public_key(), start, timedelta(days=days))
            .add_extension(
                x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        )
        return self._finish(builder, key.public_key()).pem, _private_pem(key)

    def issue_node(self, node: str, key: NodeKey, now: float, lifetime_s: float) -> Issued:
        """A certificate that says `instar://node/<node>` and nothing else: for calls, and for being called."""
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        return self._issue_named(f"instar://node/{node}", uses, key, now, lifetime_s)

    def issue_operator(self, name: str, key: NodeKey, now: float, lifetime_s: float) -> Issued:
        """A client certificate that says `instar://operator/<name>`: for the API of nodes' updaters."""
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        return self._issue_named(f"instar://operator/{name}", uses, key, now, lifetime_s)

    def _issue_named(
        self, uri: str, uses: list[x509.ObjectIdentifier], key: NodeKey, now: float, lifetime_s: float
    ) -> Issued:
        start = datetime.fromtimestamp(now, UTC)
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = (
            _builder(x509.Name([]), self._certificate.subject, key, start, timedelta(seconds=lifetime_s))
            .add_extension(names, critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        )
        return self._finish(builder, key)

    def _finish(self, builder: x509.CertificateBuilder, key: NodeKey) -> Issued:
        own = self._key.public_key()
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        return Issued(
            pem, serial_text(certificate.serial_number), certificate.not_valid_after_utc.timestamp()
        )


def check_csr(pem: str) -> NodeKey:
    """The public key of a signing request whose signature proves that the sender holds the private key.

    Raises InputError `bad-csr`.
    """
    if len(pem) > MAX_CSR:
        raise InputError("bad-csr", f"cannot use the CSR: expected at most {MAX_CSR} bytes, got {len(pem)}")
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError("bad-csr", f"cannot read the CSR: {error}") from error
    if not valid:
        raise InputError("bad-csr", "cannot use the CSR: its signature is not by its own key")
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1)):
        return key
    raise InputError("bad-csr", "cannot use the CSR: expected a P-256, P-384 or ed25519 key")


def key_hash(key: NodeKey) -> str:
    """SHA-256 of a public key, to know it again."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def expiry(pem: bytes) -> float:
    """When a certificate ends, in unix time."""
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()


def serial_text(serial: int) -> str:
    """As the ssl module shows a peer's serial number: upper-case hexadecimal of whole bytes."""
    text = f"{serial:X}"
    return text if len(text) % 2 == 0 else "0" + text


def _builder(
    subject: x509.Name, issuer: x509.Name, key: NodeKey, start: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - BACKDATE)
        .not_valid_after(start + lifetime)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
