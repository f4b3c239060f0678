"""What a node's hello must look like before anything is believed."""

from __future__ import annotations

from instar.core.errors import InputError
from instar.wire.messages import PROTOCOL, Hello
from instar_server.domain import names
from instar_server.domain.errors import Forbidden

ROLES = ("agent", "rehearsal", "beacon")


def check(hello: Hello, node: str) -> Hello:
    """The hello, if `node` (who the certificate is) may say it.

    Raises Forbidden `identity-mismatch`, InputError `unsupported-version`, `bad-hello`, `bad-digest`, ….
    """
    if hello.v != PROTOCOL:
        raise InputError("unsupported-version", f"cannot talk: expected protocol {PROTOCOL}, got {hello.v}")
    if hello.node != node:
        text = f"cannot accept the hello: the certificate is {node}'s, the hello says {hello.node[:40]!r}"
        raise Forbidden("identity-mismatch", text)
    names.one_of("role", hello.role, ROLES)
    names.version(hello.version)
    names.digest(hello.digest)
    if hello.tx or hello.role == "rehearsal":
        names.transaction(hello.tx)
    if not 0 <= hello.wake_port <= 65535:
        raise InputError("bad-hello", f"cannot accept the hello: wake_port is {hello.wake_port}")
    for what in ("boot_id", "os", "arch", "python", "built"):
        if len(getattr(hello, what)) > 64 * (4 if what == "os" else 1):
            raise InputError("bad-hello", f"cannot accept the hello: {what} is too long")
    return hello
