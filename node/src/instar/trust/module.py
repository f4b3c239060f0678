"""A module: what its manifest says, and the digest that names exactly these bytes (docs/writing-modules.md).

A module's archive is `manifest.json` and the files that it lists. The **module digest** is the SHA-384 of
the bytes of `manifest.json`, which holds the SHA-256 of every file; the signed target
`module/<name>-<version>.tar.gz` carries it in `custom` = {"kind":"module","name","version","digest","runs","mode"}.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from instar.core.errors import InputError, TrustError
from instar.core.modules import check_name as check_name  # noqa: PLC0414 - imported from here
from instar.core.releases import Release, version_key
from instar.trust.fields import Fields
from instar.trust.manifest import FORMAT, MAX_SIZE, FileEntry, read_files, write_files

KIND = "module"
CODE = "bad-manifest"
RUNS = ("python", "native", "wasm")
MODES = ("oneshot", "service")
ANY = "any"  # entry for every machine; a native module names one for each, as uname -m says


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: for one run, until a service says that it is ready, and until one that was told to stop may be."""

    run_s: float = 30.0
    ready_s: float = 10.0
    stop_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and counts of one process tree; 0: no limit of its own."""

    memory: int = 256 << 20
    processes: int = 32
    files: int = 256  # open at once, by each process
    cpu_s: int = 0
    disk: int = 64 << 20  # the largest file it may write
    output: int = 1 << 20  # bytes of reply, log and progress lines together


@dataclass(frozen=True, slots=True)
class Touches:
    """What it may reach: shown to operators, and enforced where the kernel or the sandbox can.

    `write` are folders beside its own data folder; `user` is a user's name to run as, '' for the agent's own.
    """

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    network: bool = False
    user: str = ""


@dataclass(frozen=True, slots=True)
class ModuleManifest:
    """`entry` maps a machine (uname -m), or `any`, to the path of the file to load."""

    name: str
    version: str
    runs: str
    mode: str
    entry: dict[str, str]
    files: tuple[FileEntry, ...]
    about: str = ""
    stateful: bool = False
    depends: tuple[str, ...] = ()
    timeouts: Timeouts = field(default_factory=Timeouts)
    limits: Limits = field(default_factory=Limits)
    touches: Touches = field(default_factory=Touches)

    @classmethod
    def decode(cls, data: bytes) -> ModuleManifest:
        """Read `manifest.json`. Raises InputError `bad-manifest`, `bad-path`, `bad-module-name`, `bad-version`."""
        if len(data) > MAX_SIZE:
            raise InputError(CODE, f"cannot read the manifest: at most {MAX_SIZE} bytes, got {len(data)}")
        top = Fields.decode(data, "the module's manifest", CODE)
        if top.get("format", int) != FORMAT or top.get("kind", str) != KIND:
            raise top.error(f"expected 'format' {FORMAT} and 'kind' {KIND!r}")
        version_key(top.get("version", str))
        manifest = cls(
            name=check_name(top.get("name", str)),
            version=top.get("version", str),
            runs=_one_of(top, "runs", RUNS),
            mode=_one_of(top, "mode", MODES),
            entry=_texts(top, "entry"),
            files=read_files(top),
            about=top.optional("about", ""),
            stateful=top.optional("stateful", False),
            depends=tuple(check_name(name) for name in _list(top, "depends")),
            timeouts=_timeouts(top),
            limits=_limits(top),
            touches=_touches(top),
        )
        manifest._check(top)
        return manifest

    def encode(self) -> bytes:
        """The bytes of `manifest.json`; the same manifest gives the same bytes."""
        t, limits, touches = self.timeouts, self.limits, self.touches
        value = {
            "format": FORMAT,
            "kind": KIND,
            "name": self.name,
            "version": self.version,
            "about": self.about,
            "runs": self.runs,
            "mode": self.mode,
            "stateful": self.stateful,
            "depends": list(self.depends),
            "entry": dict(sorted(self.entry.items())),
            "timeouts": {"run_s": t.run_s, "ready_s": t.ready_s, "stop_s": t.stop_s},
            "limits": {name: getattr(limits, name) for name in Limits.__slots__},
            "touches": {
                "read": list(touches.read),
                "write": list(touches.write),
                "network": touches.network,
                "user": touches.user,
            },
            "files": write_files(self.files),
        }
        return (json.dumps(value, indent=1) + "\n").encode("ascii")

    def file(self, path: str) -> FileEntry | None:
        return next((file for file in self.files if file.path == path), None)

    def entry_for(self, machine: str) -> str:
        """The file to load on `machine` (uname -m). Raises InputError `wrong-machine`."""
        path = self.entry.get(machine) or self.entry.get(ANY)
        if path is None:
            known = ", ".join(sorted(self.entry))
            text = (
                f"cannot run module {self.name} {self.version}: it is for {known}, this machine is {machine}"
            )
            raise InputError("wrong-machine", text)
        return path

    def check_target(self, version: str, digest: str, data: bytes) -> None:
        """Raise TrustError `altered-manifest` unless `data`, from which this was read, is what was signed."""
        found = module_digest(data)
        if (self.version, found) != (version, digest):
            text = f"cannot trust the manifest: expected {version} {digest[:12]}, got {self.version} {found[:12]}"
            raise TrustError("altered-manifest", text)

    def _check(self, top: Fields) -> None:
        listed = {file.path for file in self.files}
        if not self.entry or not set(self.entry.values()) <= listed:
            raise top.error("expected 'entry' to name files that are listed")
        if self.name in self.depends:
            raise top.error(f"{self.name} depends on itself")
        if self.mode == "oneshot" and (self.stateful or self.depends):
            raise top.error("only a service module can be stateful or depend on others")


def module_digest(manifest: bytes) -> str:
    """SHA-384, hexadecimal, of the bytes of `manifest.json`."""
    return hashlib.sha384(manifest).hexdigest()


def module_release(manifest: ModuleManifest, data: bytes) -> Release:
    """What the module's folder is called."""
    return Release(manifest.version, module_digest(data))


def _one_of(top: Fields, name: str, allowed: tuple[str, ...]) -> str:
    value = top.get(name, str)
    if value not in allowed:
        raise top.error(f"expected {name!r} to be one of {', '.join(allowed)}, got {value[:40]!r}")
    return value


def _list(top: Fields, name: str) -> list[str]:
    value: list[object] = top.optional(name, [])
    if not all(isinstance(part, str) for part in value):
        raise top.error(f"expected {name!r} to be a list of texts")
    return [str(part) for part in value]


def _texts(top: Fields, name: str) -> dict[str, str]:
    value = top.get(name, dict)
    if not all(isinstance(part, str) for part in value.values()):
        raise top.error(f"expected {name!r} to be an object of texts")
    return dict(value)


def _section(top: Fields, name: str) -> Fields:
    return Fields(top.optional(name, {}), f"'{name}' of the module's manifest", CODE)


def _timeouts(top: Fields) -> Timeouts:
    section, default = _section(top, "timeouts"), Timeouts()
    return Timeouts(*(_number(section, name, getattr(default, name)) for name in Timeouts.__slots__))


def _number(section: Fields, name: str, default: float) -> float:
    value = section.number(name, default)
    if not 0.1 <= value <= 86_400:
        raise section.error(f"expected {name!r} to be 0.1 to 86400 seconds, got {value}")
    return value


def _limits(top: Fields) -> Limits:
    section, default = _section(top, "limits"), Limits()
    return Limits(*(_count(section, name, getattr(default, name)) for name in Limits.__slots__))


def _count(section: Fields, name: str, default: int) -> int:
    value = section.optional(name, default)
    if not 0 <= value < 1 << 50:
        raise section.error(f"expected {name!r} to be 0 or more, got {value}")
    return value


def _touches(top: Fields) -> Touches:
    section = _section(top, "touches")
    read, write = _list(section, "read"), _list(section, "write")
    if not all(path.startswith("/") for path in (*read, *write)):
        raise section.error("expected absolute paths in 'read' and 'write'")
    network, user = section.optional("network", False), section.optional("user", "")
    return Touches(tuple(read), tuple(write), network, user)
