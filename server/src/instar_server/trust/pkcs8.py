"""PKCS#8 PEM of an ed25519 key, encrypted by PBES2 with scrypt and AES-256-CBC (RFC 8018, RFC 7914).

Written by hand because `BestAvailableEncryption` derives the key by 2,048 rounds of PBKDF2, which a
stolen file does not withstand. `load_pem_private_key` and `openssl pkey` read the result.
"""

from __future__ import annotations

import base64
import hashlib
import textwrap

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

# 16 MiB and five passes: OWASP's figure for this memory, and within what the openssl program will load.
SCRYPT_N, SCRYPT_R, SCRYPT_P = 16_384, 8, 5
OID_PBES2 = bytes.fromhex("2a864886f70d01050d")
OID_SCRYPT = bytes.fromhex("2b06010401da47040b")
OID_AES256_CBC = bytes.fromhex("60864801650304012a")
INTEGER, OCTETS, OID, SEQUENCE = 0x02, 0x04, 0x06, 0x30


def encrypted_pem(key: Ed25519PrivateKey, passphrase: bytes, salt: bytes, iv: bytes) -> bytes:
    """The PEM. `salt` and `iv` are 16 random bytes each, never used twice."""
    plain = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    secret = hashlib.scrypt(passphrase, salt=salt, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P, dklen=32)
    encryptor = Cipher(algorithms.AES256(secret), modes.CBC(iv)).encryptor()
    padding = 16 - len(plain) % 16
    sealed = encryptor.update(plain + bytes([padding]) * padding) + encryptor.finalize()
    parameters = _tlv(
        SEQUENCE, _tlv(OCTETS, salt), _integer(SCRYPT_N), _integer(SCRYPT_R), _integer(SCRYPT_P)
    )
    derivation = _tlv(SEQUENCE, _tlv(OID, OID_SCRYPT), parameters)
    scheme = _tlv(SEQUENCE, _tlv(OID, OID_AES256_CBC), _tlv(OCTETS, iv))
    algorithm = _tlv(SEQUENCE, _tlv(OID, OID_PBES2), _tlv(SEQUENCE, derivation, scheme))
    return _pem("ENCRYPTED PRIVATE KEY", _tlv(SEQUENCE, algorithm, _tlv(OCTETS, sealed)))


def _tlv(tag: int, *parts: bytes) -> bytes:
    """One DER element (at most 255 bytes long, which suits an ed25519 key)."""
    body = b"".join(parts)
    size = len(body)
    length = bytes([size]) if size < 128 else bytes([0x81, size])
    return bytes([tag]) + length + body


def _integer(value: int) -> bytes:
    return _tlv(INTEGER, value.to_bytes(value.bit_length() // 8 + 1))


def _pem(label: str, der: bytes) -> bytes:
    lines = textwrap.wrap(base64.b64encode(der).decode(), 64)
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode()
