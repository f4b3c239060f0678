"""Ask python-tuf's client about one target, over any way of fetching.

Import `instar.oneshot.diet` and call `apply` before this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater

from instar.core.errors import InstarError, MachineError, ServerRefused, TrustError
from instar.oneshot.cache import DURABLE, MetadataCache, document, version_of
from instar.oneshot.explain import Scene, explain

Fetch = Callable[[str], bytes]
"""'metadata/timestamp.json' -> its bytes. ServerRefused `not-found` when absent, ServerUnreachable, …"""

ABSENT = ("not-found", "no-metadata")  # how a server says that it has no such file
ONLINE = ("timestamp", "snapshot", "targets")


@dataclass(frozen=True, slots=True)
class VerifiedTarget:
    """A target that the threshold of the operator's keys has signed, and is signed for now."""

    path: str
    length: int  # bytes
    sha256: str
    custom: dict[str, Any]
    versions: dict[str, int]  # of root, timestamp, snapshot, targets
    dropped: list[str]  # names of local metadata files that could not be read, and were fetched again

    @property
    def url_path(self) -> str:
        """Where the server has it: targets/<dir>/<sha256>.<file>."""
        folder, slash, name = self.path.rpartition("/")
        return f"targets/{folder}{slash}{self.sha256}.{name}"


MOST_BYTES = 16 * 1024 * 1024  # of one file
TIMESTAMP = "timestamp.json"


def from_folder(folder: Path, trust: Path | None = None) -> Fetch:
    """Metadata from a folder: a parcel's. Of `trust`, where it is given, comes the timestamp that the node
    has verified last, and with it what that names."""

    def fetch(path: str) -> bytes:
        name = path.rpartition("/")[2]
        place = trust / DURABLE if trust is not None and name == TIMESTAMP else folder
        try:
            with (place / name).open("rb") as file:
                data = file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            raise ServerRefused("not-found", f"there is no {name} in {place}") from None
        except OSError as error:
            raise MachineError("disk-failed", f"cannot read {place / name}: {error.strerror}") from error
        if len(data) > MOST_BYTES:
            raise TrustError("too-long", f"cannot use {name}: expected at most {MOST_BYTES} bytes")
        return data

    return fetch


class RecordingFetcher(FetcherInterface):
    """Hands tuf's requests to `fetch` and remembers what came, for the explanation of a failure."""

    def __init__(self, fetch: Fetch) -> None:
        self._get = fetch
        self.role = "root"
        self.fetched: dict[str, bytes] = {}
        self.failure: InstarError | None = None

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.role = url.removesuffix(".json").rpartition("/")[2].rpartition(".")[2]
        try:
            data = self._get(url)
        except ServerRefused as error:
            if error.code in ABSENT:
                raise DownloadHTTPError(error.text, 404) from error
            self.failure = error
            raise DownloadError(error.text) from error
        except InstarError as error:
            self.failure = error
            raise DownloadError(error.text) from error
        self.fetched[self.role] = data
        return iter([data])


def verify_target(trust: Path, target: str, fetch: Fetch, now: datetime) -> VerifiedTarget:
    """Bring the node's metadata up to date and look up `target`.

    `now` is for words only: tuf reads the clock itself. Raises TrustError (codes of `explain`,
    `no-such-target`, `bad-target`), ServerUnreachable, ServerRefused, MachineError. Metadata that was
    verified before a failure is kept, so that a server can never take the node back behind it.
    """
    with MetadataCache(trust) as cache:
        bootstrap = cache.pinned_root()
        fetcher = RecordingFetcher(fetch)
        try:
            updater = _updater(cache, fetcher, bootstrap)
            updater.refresh()
            info = updater.get_targetinfo(target)
        except (RepositoryError, DownloadError) as error:
            failure = fetcher.failure or explain(error, _scene(cache, fetcher, now))
            cache.keep()
            raise failure from error
        cache.keep()
        if info is None:
            version = version_of(cache.local("targets"))
            raise TrustError(
                "no-such-target",
                f"cannot use {target}: the signed targets version {version} does not list it",
            )
        return _verified(target, info, cache)


def _updater(cache: MetadataCache, fetcher: FetcherInterface, bootstrap: bytes) -> Updater:
    folder = str(cache.scratch)
    try:
        return Updater(folder, "metadata/", folder, "targets/", fetcher, bootstrap=bootstrap)
    except RepositoryError as error:
        raise TrustError(
            "bad-pinned-root", f"cannot verify anything: pinned-root.json does not hold: {error}"
        ) from error


def _scene(cache: MetadataCache, fetcher: RecordingFetcher, now: datetime) -> Scene:
    trusted = {role: data for role in ("root", *ONLINE) if (data := cache.local(role)) is not None}
    return Scene(fetcher.role, fetcher.fetched, trusted, now)


def _verified(target: str, info: TargetFile, cache: MetadataCache) -> VerifiedTarget:
    sha256 = info.hashes.get("sha256")
    if sha256 is None:
        raise TrustError("bad-target", f"cannot use {target}: it is signed without a sha256")
    custom = info.custom
    versions = {role: document(cache.local(role))["version"] for role in ("root", *ONLINE)}
    fields = custom if isinstance(custom, dict) else {}
    return VerifiedTarget(target, info.length, sha256, fields, versions, cache.dropped)
