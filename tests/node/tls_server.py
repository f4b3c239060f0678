"""A TLS server in a thread that answers as it is told, and a proxy that knows CONNECT."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Handler = Callable[[str, dict[str, str], ssl.SSLSocket], bool]  # whether to keep the connection


class Authority:
    """A CA of one server certificate for 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ca, self.chain = folder / "ca.pem", folder / "server.pem"
        ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        basic, server = x509.BasicConstraints(ca=True, path_length=None), x509.BasicConstraints(False, None)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        own = self._builder(ca_name, ca_name, ca_key).add_extension(basic, True).sign(ca_key, hashes.SHA256())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        leaf = self._builder(name, ca_name, key).add_extension(server, True).add_extension(names, False)
        self.ca.write_bytes(own.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        signed = leaf.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        self.chain.write_bytes(private + signed)

    @staticmethod
    def _builder(name: x509.Name, by: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(by).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        day = datetime.timedelta(days=1)
        return builder.not_valid_before(now - day).not_valid_after(now + day)


@dataclass
class Listener:
    """Accepts on a port of 127.0.0.1; each connection is served by a thread."""

    connections: int = 0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._guarded, args=(connection,), daemon=True).start()

    def _guarded(self, connection: socket.socket) -> None:
        connection.settimeout(60)
        with contextlib.suppress(OSError), connection:
            self.serve(connection)

    def serve(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def read_head(connection: socket.socket) -> tuple[str, dict[str, str]]:
    """The request line and its headers; ('', {}) at the end of the stream."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            return "", {}
        head += byte
    first, *lines = head.decode().split("\r\n")
    return first, {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}


class TlsServer(Listener):
    def __init__(self, authority: Authority, handler: Handler) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(authority.chain)
        self.handler = handler
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        with self.context.wrap_socket(connection, server_side=True) as secure:
            while True:
                line, headers = read_head(secure)
                if not line:
                    return
                left = int(headers.get("content-length", "0"))
                while left > 0:
                    left -= len(secure.recv(left))
                self.requests.append((line, headers))
                if not self.handler(line, headers, secure):
                    return


class Proxy(Listener):
    """Tunnels CONNECT to the address that is asked for."""

    def serve(self, connection: socket.socket) -> None:
        line, headers = read_head(connection)
        self.requests.append((line, headers))
        host, _, port = line.split()[1].rpartition(":")
        with socket.create_connection((host, int(port)), 60) as far:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=self._pump, args=(far, connection), daemon=True)
            back.start()
            self._pump(connection, far)
            back.join(5)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def answer(
    secure: ssl.SSLSocket, body: bytes, status: str = "200 OK", extra: str = "", length: int = -1
) -> bool:
    size = len(body) if length < 0 else length
    secure.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n{extra}\r\n".encode() + body)
    return length < 0
