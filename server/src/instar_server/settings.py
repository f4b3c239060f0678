"""What an operator may set, and where things lie below the data folder.

<data>/
  server.toml            what this file reads; made by `init`
  ca/   ca.pem key.pem   the fleet's certificate authority
  tls/  server.pem       the server's own key and certificate
  trust/                 the signed repository (instar_server.trust)
  online/                the keys of the snapshot and timestamp roles
  server.db              the database
  uploads/               only while something is uploaded
  parcels/               what is sent to nodes through their channels; made anew when it is gone
  admin.token            the first API token
  run/ports.json         where the running server listens
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instar.core.errors import InputError
from instar.wire.messages import BLOCK_BOUNDS, WINDOW_BOUNDS
from instar_server.trust.files import write_atomic


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths only."""

    data: Path

    @property
    def config(self) -> Path:
        return self.data / "server.toml"

    @property
    def ca(self) -> Path:
        return self.data / "ca"

    @property
    def certificate(self) -> Path:
        """The server's key and certificate, in one file."""
        return self.data / "tls" / "server.pem"

    @property
    def trust(self) -> Path:
        return self.data / "trust"

    @property
    def online(self) -> Path:
        return self.data / "online"

    @property
    def database(self) -> Path:
        return self.data / "server.db"

    @property
    def parcels(self) -> Path:
        return self.data / "parcels"

    @property
    def admin_token(self) -> Path:
        return self.data / "admin.token"

    @property
    def ports(self) -> Path:
        return self.data / "run" / "ports.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """Names are those of server.toml. Seconds where a name ends in `_s`; port 0 means any free one.

    `hosts[0]` is the name by which nodes are told to reach the server; `public_gateway`
    (https://host:port) says otherwise, for a server behind another address. `artifacts_port` is a second port
    for nodes, which alone serves metadata and targets (-1: there is none), `public_artifacts` its address where
    that is another one.
    """

    hosts: list[str] = field(default_factory=lambda: ["localhost", "127.0.0.1"])
    bind: str = "0.0.0.0"
    gateway_port: int = 8443
    api_port: int = 8444
    public_gateway: str = ""
    artifacts_port: int = -1
    public_artifacts: str = ""
    insecure_http: bool = False
    ping_s: float = 30.0
    health_s: float = 60.0
    job_s: float = 30.0
    job_resend_s: float = 10.0  # until an order that is not taken is sent again
    job_silence_s: float = 60.0  # how late a result may be until its node is asked
    poll_s: float = 300.0
    look_floor_s: float = 30.0
    certificate_days: float = 30.0
    wrong_tokens: int = 10  # enrolment tokens that are not good, from one address in a minute
    max_upload: int = 1_073_741_824  # bytes
    native_block: int = 65_536  # bytes of a block of a transfer through the channel; a node may want less
    native_window: int = 16  # blocks under way
    native_rate: int = 0  # bytes a second to one node; 0: no cap
    beacon_recovery: bool = True  # a node that calls by its beacon is recovered without an operator's word
    stop_within_s: float = 8.0


_BOUNDS: dict[str, tuple[float, float]] = {
    "gateway_port": (0, 65535), "api_port": (0, 65535), "artifacts_port": (-1, 65535),
    "native_block": BLOCK_BOUNDS, "native_window": WINDOW_BOUNDS, "native_rate": (0, 10**12),
    "ping_s": (0.2, 3600), "health_s": (0.2, 86400),
    "job_s": (0.2, 3600), "job_resend_s": (0.2, 3600), "job_silence_s": (0.2, 3600),
    "poll_s": (1, 86400), "look_floor_s": (0.1, 86400), "certificate_days": (0.001, 3650),
    "wrong_tokens": (1, 1_000_000), "max_upload": (1024, 2**40), "stop_within_s": (0.5, 300),
}  # fmt: skip


def load(layout: Layout, **changes: Any) -> Settings:
    """Read server.toml; `changes` that are not None come on top. Raises InputError `bad-settings`."""
    try:
        with layout.config.open("rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise InputError(
            "not-initialised",
            f"cannot read {layout.config}: run 'instar-server init --data {layout.data}' first",
        ) from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError("bad-settings", f"cannot read {layout.config}: {error}") from error
    values |= {name: value for name, value in changes.items() if value is not None}
    return check(values, str(layout.config))


def check(values: dict[str, Any], where: str) -> Settings:
    """Settings from plain values, each of the right type and inside its bounds."""
    defaults = Settings()
    for name in tuple(values):
        value = values[name]
        if name not in Settings.__dataclass_fields__:
            raise InputError("bad-settings", f"cannot use {where}: {name!r} is not a setting")
        wanted = type(getattr(defaults, name))
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            values[name] = value = float(value)
        if type(value) is not wanted:
            raise InputError(
                "bad-settings", f"cannot use {where}: expected {name} as {wanted.__name__}, got {value!r}"
            )
        if wanted is list and not all(isinstance(item, str) for item in value):
            raise InputError("bad-settings", f"cannot use {where}: expected {name} as texts, got {value!r}")
        low, high = _BOUNDS.get(name, (0, 0))
        if name in _BOUNDS and not low <= value <= high:
            raise InputError(
                "bad-settings", f"cannot use {where}: expected {name} in {low:g}..{high:g}, got {value}"
            )
    settings = Settings(**values)
    if not settings.hosts or not all(settings.hosts):
        raise InputError("bad-settings", f"cannot use {where}: expected at least one host name")
    if settings.insecure_http and settings.bind not in ("127.0.0.1", "::1", "localhost"):
        raise InputError(
            "bad-settings", f"cannot use {where}: insecure_http is for loopback only, got {settings.bind}"
        )
    return settings


def save(layout: Layout, settings: Settings) -> None:
    """Write server.toml: what differs from the defaults, and the hosts."""
    defaults = dataclasses.asdict(Settings())
    lines = [
        f"{name} = {json.dumps(value)}"
        for name, value in dataclasses.asdict(settings).items()
        if name == "hosts" or value != defaults[name]
    ]
    write_atomic(layout.config, ("\n".join(lines) + "\n").encode(), 0o644)
