"""A P-256 key and a certificate request (PKCS#10), made on the node without any wheel.

The libcrypto that Python's own `_ssl` has loaded does the work through ctypes; where that is older than
OpenSSL 3 or linked in statically, the `openssl` program does. Every return value is checked, and every
object is freed. The private key leaves this module only as the PEM that the caller stores.
"""

from __future__ import annotations

import base64
import ctypes
import os
import ssl
import subprocess
import textwrap
from contextlib import ExitStack
from typing import Any

from instar.core.errors import MachineError

MBSTRING_ASC = 0x1001  # openssl/asn1.h
PROGRAM_WITHIN_S = 15.0
CONFIGURATION = b"[req]\ndistinguished_name = name\n[name]\n"
Pointer = ctypes.c_void_p
Text = ctypes.c_char_p
Int = ctypes.c_int
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "EVP_PKEY_Q_keygen": (Pointer, (Pointer, Pointer, Text)),  # variadic: the curve's name follows
    "EVP_PKEY_free": (None, (Pointer,)),
    "EVP_sha256": (Pointer, ()),
    "X509_REQ_new": (Pointer, ()),
    "X509_REQ_free": (None, (Pointer,)),
    "X509_REQ_set_pubkey": (Int, (Pointer, Pointer)),
    "X509_REQ_get_subject_name": (Pointer, (Pointer,)),
    "X509_NAME_add_entry_by_txt": (Int, (Pointer, Text, Int, Text, Int, Int, Int)),
    "X509_REQ_sign": (Int, (Pointer, Pointer, Pointer)),
    "i2d_PrivateKey": (Int, (Pointer, ctypes.POINTER(Pointer))),
    "i2d_X509_REQ": (Int, (Pointer, ctypes.POINTER(Pointer))),
}


def by_libcrypto(name: str) -> tuple[bytes, bytes]:
    """(key PEM, CSR PEM) with the common name `name`. Raises MachineError `no-libcrypto`, `keygen-failed`."""
    lib = _Libcrypto(_loaded_libcrypto())
    with ExitStack() as stack:
        key = lib.made("EVP_PKEY_Q_keygen", None, None, b"EC", Text(b"P-256"))
        stack.callback(lib.call, "EVP_PKEY_free", key)
        request = lib.made("X509_REQ_new")
        stack.callback(lib.call, "X509_REQ_free", request)
        lib.made("X509_REQ_set_pubkey", request, key)
        subject = lib.made("X509_REQ_get_subject_name", request)  # belongs to the request
        lib.made("X509_NAME_add_entry_by_txt", subject, b"CN", MBSTRING_ASC, name.encode("ascii"), -1, -1, 0)
        lib.made("X509_REQ_sign", request, key, lib.made("EVP_sha256"))
        key_pem = _pem("EC PRIVATE KEY", lib.der("i2d_PrivateKey", key))
        return key_pem, _pem("CERTIFICATE REQUEST", lib.der("i2d_X509_REQ", request))


def by_program(name: str, program: str = "openssl") -> tuple[bytes, bytes]:
    """The same by the `openssl` program; nothing touches the disk. Raises MachineError `keygen-failed`."""
    key = _run([program, "ecparam", "-name", "prime256v1", "-genkey", "-noout"], b"")
    configuration = os.memfd_create("openssl.cnf", os.MFD_CLOEXEC)
    try:
        os.write(configuration, CONFIGURATION)
        # The child opens the path anew, so it reads from the start whatever our offset is.
        command = [program, "req", "-new", "-batch", "-sha256", "-config", f"/proc/self/fd/{configuration}"]
        csr = _run([*command, "-key", "/dev/stdin", "-subj", f"/CN={name}"], key, configuration)
    finally:
        os.close(configuration)
    return key, csr


class _Libcrypto:
    """Typed calls; a null pointer or a result below 1 is an error."""

    def __init__(self, path: str) -> None:
        try:
            library = ctypes.CDLL(path)
            self._calls = {name: getattr(library, name) for name in SIGNATURES}
        except (OSError, AttributeError) as error:
            raise MachineError("no-libcrypto", f"cannot use {path}: {error}") from error
        for name, (result, arguments) in SIGNATURES.items():
            self._calls[name].restype = result
            self._calls[name].argtypes = arguments

    def call(self, name: str, *arguments: Any) -> Any:
        return self._calls[name](*arguments)

    def made(self, name: str, *arguments: Any) -> Any:
        value = self.call(name, *arguments)
        if value is None or value < 1:
            raise MachineError("keygen-failed", f"cannot make the node's key: {name} gave {value}")
        return value

    def der(self, name: str, thing: Any) -> bytes:
        """The DER bytes of `thing`; the buffer, which may hold a private key, is wiped."""
        size = self.made(name, thing, None)
        buffer = ctypes.create_string_buffer(size)
        place = Pointer(ctypes.addressof(buffer))
        try:
            written = self.made(name, thing, ctypes.byref(place))
            if written != size:
                raise MachineError(
                    "keygen-failed", f"cannot make the node's key: {name} gave {written} bytes, not {size}"
                )
            return buffer.raw
        finally:
            ctypes.memset(buffer, 0, size)


def _loaded_libcrypto() -> str:
    """The path of the libcrypto in this process: of the same version as the ssl module, by definition."""
    if ssl.OPENSSL_VERSION_INFO[0] < 3:
        raise MachineError("no-libcrypto", f"cannot use {ssl.OPENSSL_VERSION}: expected OpenSSL 3 or newer")
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            if "/libcrypto" in line:
                return line.split(maxsplit=5)[5].strip()
    raise MachineError("no-libcrypto", "cannot find libcrypto: Python's ssl module has it linked in")


def _pem(label: str, der: bytes) -> bytes:
    lines = textwrap.wrap(base64.b64encode(der).decode("ascii"), 64)
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode("ascii")


def _run(command: list[str], given: bytes, *descriptors: int) -> bytes:
    try:
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            timeout=PROGRAM_WITHIN_S,
            check=True,
            pass_fds=descriptors,
        )
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode("utf-8", "replace").strip()[-300:]
        raise MachineError(
            "keygen-failed", f"cannot make the node's key: {command[1]} said {words}"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("keygen-failed", f"cannot make the node's key by {command[0]}: {error}") from None
    return done.stdout
