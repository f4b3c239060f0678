"""What an operator may set on a node (config.toml), with bounds. Pure: a dict in, settings out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from instar.core.errors import InputError
from instar.core.networks import WakeSettings, address_bytes, network
from instar.core.releases import version_key


@dataclass(frozen=True, slots=True)
class TrialSettings:
    """Seconds, and the number of starts that a release on trial has."""

    hold_s: float = 10.0  # how long it must run under one pid
    lease_s: float = 120.0  # confirmed within this, or reverted
    cap_s: float = 3600.0  # the longest stretch while nobody reaches the server
    attempts: int = 3


@dataclass(frozen=True, slots=True)
class RehearsalSettings:
    within_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """After a switch: how often, and how far apart in seconds, the new release is asked before it goes back."""

    tries: int = 10
    every_s: float = 1.0


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    rate_bytes_s: int = 0  # 0: no cap on fetching
    proxy: str = ""  # http://host:port


@dataclass(frozen=True, slots=True)
class UpdaterSettings:
    poll_s: float = 0.0  # 0: as the server says
    retry_floor_s: float = 1.0
    retry_cap_s: float = 300.0
    api: str = "127.0.0.1:7612"  # where the updater's API listens, host:port; '': nowhere


@dataclass(frozen=True, slots=True)
class ModuleSettings:
    wasmtime: str = ""  # folder that holds the Python package wasmtime; '': where the interpreter looks


@dataclass(frozen=True, slots=True)
class NativeSettings:
    """Updates through the control channel. The server's figures hold where they are smaller."""

    mode: str = "auto"  # auto | never | force: whatever is installed
    block: int = 65_536  # bytes
    window: int = 16  # blocks under way
    rate_bytes_s: int = 0  # 0: as network.rate_bytes_s


@dataclass(frozen=True, slots=True)
class OsSettings:
    """The node's own system in two slots of a disk."""

    disk: str = ""  # the device (or an image file) that has both slots; '': this node has none
    slots: tuple[str, ...] = ("instar-system-a", "instar-system-b")  # names of their partitions
    esp: str = "/efi"  # where the disk's EFI system partition is mounted
    hardware: str = ""  # names that bundles may be for, blanks between them; '': as the firmware says
    answer_s: float = 10.0  # from an activation to the machine's way down
    guard_s: float = 300.0  # what boot-guard leaves a system for coming up, beside its trial
    min_bundle_version: str = ""  # no older bundle is taken


@dataclass(frozen=True, slots=True)
class Settings:
    trial: TrialSettings = field(default_factory=TrialSettings)
    rehearsal: RehearsalSettings = field(default_factory=RehearsalSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    updater: UpdaterSettings = field(default_factory=UpdaterSettings)
    wake: WakeSettings = field(default_factory=WakeSettings)
    modules: ModuleSettings = field(default_factory=ModuleSettings)
    native: NativeSettings = field(default_factory=NativeSettings)
    os: OsSettings = field(default_factory=OsSettings)


BOUNDS: dict[str, tuple[float, float]] = {
    "trial.hold_s": (0.0, 86400.0),
    "trial.lease_s": (1.0, 86400.0),
    "trial.cap_s": (1.0, 7 * 86400.0),
    "trial.attempts": (1, 100),
    "rehearsal.within_s": (0.5, 3600.0),
    "probe.tries": (1, 1000),
    "probe.every_s": (0.05, 60.0),
    "network.rate_bytes_s": (0, 1e12),
    "updater.poll_s": (0.0, 86400.0),
    "updater.retry_floor_s": (0.05, 3600.0),
    "updater.retry_cap_s": (0.05, 86400.0),
    "wake.port": (0, 65535),
    "wake.every_s": (0.1, 86400.0),
    "native.block": (1_024, 131_072),
    "native.window": (1, 64),
    "native.rate_bytes_s": (0, 1e12),
    "os.answer_s": (0.0, 3600.0),
    "os.guard_s": (0.0, 86400.0),
}

MODES = ("auto", "never", "force")
ABSOLUTE = ("modules.wasmtime", "os.disk", "os.esp")
MOST_NAME = 36  # letters of a partition's name (UEFI specification 2.10, table 5.6)
MOST_NETWORKS = 256
PROXY = re.compile(r"http://[^\s/?#]+/?")
# An address, not a name: to listen must not wait for a resolver.
ADDRESS = re.compile(r"(\d{1,3}(?:\.\d{1,3}){3}|\[[0-9A-Fa-f:.]{2,45}\]):([1-9]\d{0,4})")


def read_settings(document: Mapping[str, Any]) -> Settings:
    """Check a parsed config.toml. Raises InputError naming the key, what was expected and what was there."""
    sections: dict[str, Any] = {}
    known = {f.name: f.default_factory for f in fields(Settings)}
    for name, table in document.items():
        if name not in known:
            raise InputError(
                "bad-config", f"cannot read config: expected one of {sorted(known)}, got {name!r}"
            )
        if not isinstance(table, Mapping):
            raise InputError("bad-config", f"cannot read config: expected a table [{name}], got {table!r}")
        sections[name] = _section(name, known[name](), table)  # type: ignore[operator]
    settings = Settings(**sections)
    if settings.trial.cap_s < settings.trial.lease_s or settings.trial.lease_s < settings.trial.hold_s:
        raise InputError("bad-config", "cannot read config: expected trial.hold_s <= lease_s <= cap_s")
    if settings.updater.retry_cap_s < settings.updater.retry_floor_s:
        raise InputError("bad-config", "cannot read config: expected updater.retry_floor_s <= retry_cap_s")
    return settings


def _section(name: str, default: Any, table: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in default.__dataclass_fields__:
            known = sorted(default.__dataclass_fields__)
            raise InputError("bad-config", f"cannot read config: [{name}] has {known}, got {key!r}")
        values[key] = _value(f"{name}.{key}", getattr(default, key), value)
    return type(default)(**values)


def _value(path: str, default: Any, value: Any) -> Any:
    kind = type(default)
    if kind is tuple:
        return _partitions(path, value) if path == "os.slots" else _networks(path, value)
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or isinstance(value, bool):
        raise InputError("bad-config", f"cannot read config: {path}: expected {kind.__name__}, got {value!r}")
    if path == "network.proxy" and value and not PROXY.fullmatch(value):  # it may hold a password: not shown
        raise InputError(
            "bad-config", f"cannot read config: {path}: expected http://host:port, got another form"
        )
    if path in ABSOLUTE and not value.startswith("/") and value != default:  # '' where that says 'none'
        raise InputError(
            "bad-config", f"cannot read config: {path}: expected an absolute path, got {value!r}"
        )
    if path == "native.mode" and value not in MODES:
        raise InputError(
            "bad-config", f"cannot read config: {path}: expected one of {', '.join(MODES)}, got {value!r}"
        )
    if path == "updater.api" and value:
        host_port(value)
    if path == "os.min_bundle_version" and value:
        _version(path, value)
    if path in BOUNDS:
        low, high = BOUNDS[path]
        if not low <= value <= high:
            text = f"cannot read config: {path}: expected {low:g} to {high:g}, got {value!r}"
            raise InputError("bad-config", text)
    return kind(value)


def host_port(api: str) -> tuple[str, int]:
    """Address and port of `updater.api`. Raises InputError `bad-config`."""
    match = ADDRESS.fullmatch(api)
    host, port = (match[1].strip("[]"), int(match[2])) if match else ("", 0)
    if not 0 < port < 65536 or address_bytes(host) is None:
        text = f"expected ADDRESS:PORT such as 127.0.0.1:7612 or [::1]:7612, got {api!a:.80}"
        raise InputError("bad-config", f"cannot read config: updater.api: {text}")
    return host, port


def _version(path: str, value: str) -> None:
    try:
        version_key(value)
    except InputError as error:
        raise InputError("bad-config", f"cannot read config: {path}: {error.text}") from None


def _partitions(path: str, value: Any) -> tuple[str, ...]:
    """The names of two partitions."""
    good = isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)
    if not good or value[0] == value[1] or not all(0 < len(name) <= MOST_NAME for name in value):
        text = f"expected the names of two partitions, of 1 to {MOST_NAME} letters, got {value!r:.200}"
        raise InputError("bad-config", f"cannot read config: {path}: {text}")
    return tuple(value)


def _networks(path: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError("bad-config", f"cannot read config: {path}: expected a list of texts, got {value!r}")
    if len(value) > MOST_NETWORKS:
        text = f"cannot read config: {path}: expected at most {MOST_NETWORKS} networks, got {len(value)}"
        raise InputError("bad-config", text)
    for each in value:
        try:
            network(each)
        except InputError as error:
            raise InputError("bad-config", f"cannot read config: {path}: {error.text}") from None
    return tuple(value)
