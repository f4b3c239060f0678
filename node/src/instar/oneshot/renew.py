"""`renew --state DIR`: a new key and a new certificate for this node, before the old one lapses.

The order that must hold, so that a kill anywhere leaves a key and a certificate that fit together:
`key.pem` and `cert.pem` are links into `current/`, which is a link to one pair's folder; a new pair is
written and synced whole, then `current` is moved by one rename. The first renewal turns the two plain
files of the enrolment into such links, each step with the same contents behind both names.

    identity/key.pem -> current/key.pem    cert.pem -> current/cert.pem    current -> pairs/<number>
    identity/pairs/1/{key.pem,cert.pem}    pairs/2/…        the newest two are kept
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from instar.core.errors import InputError, InstarError, MachineError
from instar.host.files import DISK, Disk, make_folder, point_link, remove_tree, write_atomic
from instar.host.layout import Layout
from instar.host.locks import RoleLock
from instar.host.points import reach
from instar.host.records import read_config, read_node
from instar.host.tls import client_context
from instar.host.transport import Endpoint, Transport
from instar.version import VERSION

LOCK_WITHIN_S = 5.0
KEPT = 2
LINKS = ("key.pem", "cert.pem")


def renew(layout: Layout, program: str, disk: Disk = DISK) -> None:
    """Ask for a certificate and put it in place. `program` is the Instar-Program header's value.

    Raises ServerUnreachable, ServerRefused or MachineError; the old pair then stays in use.
    """
    from instar.oneshot.identity import make_key_and_csr

    node = read_node(layout)
    try:
        proxy = read_config(layout).network.proxy
    except InputError:
        proxy = ""  # the agent has said so; a node that cannot renew would be lost
    endpoint = Endpoint(node.server, layout.ca, layout.certificate, layout.key, proxy, program)
    key, csr = make_key_and_csr(node.node)
    transport = Transport(endpoint)
    try:
        answer = transport.call("POST", "/v1/renew", {"v": 1, "csr": csr.decode()})
    finally:
        transport.close()
    certificate = answer.get("certificate") if isinstance(answer, dict) else None
    if not isinstance(certificate, str):
        text = "cannot renew: expected an answer with 'certificate' as text, got another"
        raise InputError("bad-answer", text)
    put_pair(layout, key, certificate.encode(), disk)


def put_pair(layout: Layout, key: bytes, certificate: bytes, disk: Disk = DISK) -> None:
    """Make this pair the node's. Raises MachineError when it does not fit together; then nothing changed."""
    pairs = layout.identity / "pairs"
    make_folder(pairs, 0o700, disk)
    if not (layout.identity / "current").is_symlink():
        old = _write_pair(pairs, layout.key.read_bytes(), layout.certificate.read_bytes(), disk)
        point_link(layout.identity / "current", f"pairs/{old}", disk)
    for name in LINKS:
        if not (layout.identity / name).is_symlink():
            point_link(layout.identity / name, f"current/{name}", disk)
            reach(f"renew:{name}:linked")
    new = _write_pair(pairs, key, certificate, disk)
    client_context(layout.ca, pairs / new / "cert.pem", pairs / new / "key.pem")
    reach("renew:written")
    point_link(layout.identity / "current", f"pairs/{new}", disk)
    reach("renew:done")
    for number in _numbers(pairs)[:-KEPT]:
        remove_tree(pairs / str(number))


def _write_pair(pairs: Path, key: bytes, certificate: bytes, disk: Disk) -> str:
    """A new numbered folder with both files, synced; nothing points to it yet."""
    number = str(max(_numbers(pairs), default=0) + 1)
    make_folder(pairs / number, 0o700, disk)
    write_atomic(pairs / number / "key.pem", key, 0o600, disk)
    write_atomic(pairs / number / "cert.pem", certificate, 0o644, disk)
    return number


def _numbers(pairs: Path) -> list[int]:
    return sorted(int(name) for name in os.listdir(pairs) if name.isdecimal())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="instar renew", description="Renew this node's certificate now.")
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="the node's state folder")
    layout = Layout(parser.parse_args(argv).state.absolute())
    try:
        from instar.trust.program import program_digest

        digest = program_digest(Path(sys.argv[0]).read_bytes())
        with RoleLock(layout.run / "renew.lock") as lock:
            lock.acquire(LOCK_WITHIN_S)
            renew(layout, f"agent {VERSION} {digest}")
    except InstarError as error:
        print(f"instar renew: {error.text} ({error.code})", file=sys.stderr, flush=True)
        return error.exit_status
    except OSError as error:
        print(f"instar renew: {error}", file=sys.stderr, flush=True)
        return MachineError.exit_status
    return 0
