"""The published system bundles, read from the signed targets metadata."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from instar.core.errors import InstarError, MachineError
from instar.core.releases import version_key
from instar.trust import bundle as bundles
from instar_server.trust.records import TargetRecord
from instar_server.trust.repository import Repository

MOST_READ = 16 << 20  # bytes of a manifest; what a larger one says is left to the nodes
MOST_KNOWN = 200


@dataclass(frozen=True, slots=True)
class SystemBundle:
    """`digest`: SHA-384 of its manifest; `compatible`: the hardware that it fits."""

    name: str
    version: str
    target: str  # TUF target path
    digest: str
    compatible: tuple[str, ...]
    arch: str
    length: int
    sha256: str
    custom: dict[str, Any]


class Bundles:
    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._least: OrderedDict[str, str] = OrderedDict()  # sha256 -> min_version; a file never changes

    def all(self) -> list[SystemBundle]:
        """By name, newest version first."""
        found = [bundle for record in self._repository.targets() if (bundle := _bundle(record)) is not None]
        found.sort(key=lambda bundle: version_key(bundle.version), reverse=True)
        found.sort(key=lambda bundle: bundle.name)
        return found

    def find(self, target: str) -> SystemBundle | None:
        return next((bundle for bundle in self.all() if bundle.target == target), None)

    def min_version(self, bundle: SystemBundle) -> str:
        """The oldest system that may take it, '' for any, from the manifest in its file. Blocks on the disk.

        Raises MachineError `unavailable`: the file is not what was signed, or is not there.
        """
        if bundle.sha256 not in self._least:
            self._least[bundle.sha256] = self._read(bundle)
            if len(self._least) > MOST_KNOWN:
                self._least.popitem(last=False)
        return self._least[bundle.sha256]

    def _read(self, bundle: SystemBundle) -> str:
        folder, _, name = bundle.target.rpartition("/")
        path = self._repository.target_file(f"{folder}/{bundle.sha256}.{name}")
        if path is None:
            raise _unavailable(bundle, "blob-missing: its file is not in the repository")
        try:
            with path.open("rb") as file:
                length = bundles.manifest_length(file.read(bundles.HEAD))
                if length > MOST_READ:
                    return ""
                manifest = file.read(length)
            if bundles.bundle_digest(manifest) != bundle.digest:
                raise _unavailable(bundle, "altered-bundle: its manifest is not the one that was signed")
            return bundles.decode(manifest).min_version
        except OSError as error:
            raise _unavailable(bundle, f"disk-failed: {error.strerror}") from None
        except MachineError:
            raise
        except InstarError as error:
            raise _unavailable(bundle, f"{error.code}: {error.text}") from None


def _unavailable(bundle: SystemBundle, why: str) -> MachineError:
    return MachineError("unavailable", f"cannot use {bundle.target}: {why}")


def _bundle(record: TargetRecord) -> SystemBundle | None:
    custom = record.custom
    words = [custom.get(name) for name in ("name", "version", "digest", "arch")]
    compatible = custom.get("compatible")
    good = isinstance(compatible, list) and all(isinstance(each, str) for each in [*compatible, *words])
    if custom.get("kind") != bundles.KIND or not good:
        return None
    name, version, digest, arch = map(str, words)
    try:
        version_key(version)
    except InstarError:
        return None
    return SystemBundle(
        name,
        version,
        record.path,
        digest,
        tuple(compatible or ()),
        arch,
        record.length,
        record.sha256,
        custom,
    )
