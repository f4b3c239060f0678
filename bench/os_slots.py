"""Figures of system updates: an image into a slot beside RAUC and dd, what is fetched when little has changed, and how
long a machine is away.

Ours is the whole way that an image takes on a node (bench.os_child): the order is there, the TUF metadata is
brought up to date and verified, the bundle comes from a real server over TLS, every chunk is unpacked, checked,
written and synced, then the slot is read back from the disk. RAUC's is `rauc install` of a bundle on the disk, in
its plain format, by its service. All write to the same file, by turns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench import os_downtime, os_images
from bench.figures import Figure
from bench.os_child import IDLE, RUNNING
from bench.peers import rauc
from bench.peers.apart import PeerUnavailable, usable
from instar.core.errors import MachineError
from instar.targets.slots.records import SlotRecord, write_records
from instar.trust.bundle import BLOCK, Bundle, bundle_digest
from instar_lab.fleet import Fleet
from instar_lab.node import Node
from instar_lab.osimage import packages, variant
from instar_lab.program import build
from instar_server.trust.bundle import Built

IMAGE_BYTES = 200_000_000 // BLOCK * BLOCK
SLOT_BYTES = 256 << 20
UPDATE_S = 300.0
LEAST = 3  # turns
MB = 1e6
OURS, FIRST, DD = "ours", "ours, of a first system", "dd conv=fsync (this run)"
# The one that counts first: as `rauc bundle` packs when nothing is said.
PEERS = {"RAUC (this run)": "gzip", "RAUC with zstd (this run)": "zstd"}
PACKAGE = "libexpat1"
LIBRARY = "usr/lib/x86_64-linux-gnu"


def measure(turns: int, boots: int, cache: Path) -> list[Figure]:
    """What cannot be had here is left out, with its reason in a line. `boots` 0: no virtual machine."""
    figures: list[Figure] = []
    cache = usable(cache, "images")
    with Site(cache) as site:
        parts: dict[str, Callable[[], list[Figure]]] = {
            "an image into a slot": lambda: into_slot(site, max(turns, LEAST), cache),
            "what is fetched": lambda: one_package(site),
        }
        if boots:
            parts["the time away"] = lambda: os_downtime.measure(boots)
        for name, part in parts.items():
            try:
                figures += part()
            except (MachineError, AssertionError) as error:  # the virtual machine's world tells by assertions
                print(f"make bench: goes on without figures of {name}: {error}", flush=True)
    return figures


class Site:
    """A real server and an enrolled node whose programs do not run: its updates are made by `bench.os_child`."""

    def __init__(self, cache: Path) -> None:
        # On a disk, not in memory: what is measured is a disk's work.
        self._folder = tempfile.TemporaryDirectory(prefix="os-", dir=cache, ignore_cleanup_errors=True)
        self.folder, self._fleet = Path(self._folder.name), Fleet(0)
        self._updates = 0

    def __enter__(self) -> Site:
        try:
            self._fleet.__enter__()
            program = build.build("1.0.0")
            server, handed = self._fleet.server, self.folder / "instar.pyz"
            server.publish(program)
            server.hand_out(program, server.token(1), handed)
            self._node = Node(self._fleet.folder / "n")
            self._node.install(handed, start=False)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._fleet.close()
        self._folder.cleanup()

    def publish(self, bundle: Path, built: Built) -> None:
        self._fleet.server.publish_file(built, bundle)

    def update(
        self, built: Built, slots: Mapping[str, Path], running: SlotRecord, manifest: bytes
    ) -> dict[str, float]:
        """One update to `built`, on a node that knows of nothing but `running` ('' as its manifest: not even that)."""
        self._updates += 1
        known = self._node.layout.state / "os"
        shutil.rmtree(known, ignore_errors=True)
        write_records(known / "slots.json", {RUNNING: running})
        if manifest:
            (known / f"{RUNNING}.manifest").write_bytes(manifest)
        esp = slots[RUNNING].parent / "esp"
        esp.mkdir(exist_ok=True)
        order = self.folder / "order.json"
        order.write_text(json.dumps({
            "state": str(self._node.state), "esp": str(esp), "slots": {name: str(slots[name]) for name in slots},
            "slot_bytes": SLOT_BYTES, "tx": f"tx-{self._updates}", "target": built.path,
            "version": built.custom["version"], "digest": built.custom["digest"],
            "hardware": built.custom["compatible"][0], "arch": built.custom["arch"],
        }))  # fmt: skip
        told: dict[str, float] = json.loads(run(sys.executable, "-m", "bench.os_child", str(order)))
        return told


def run(*words: str) -> str:
    """What it said. Raises MachineError `command-failed`."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=UPDATE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("command-failed", f"cannot run {words[0]}: {error}") from None
    if done.returncode != 0:
        raise MachineError(
            "command-failed", f"cannot run {' '.join(words)[:200]}: {done.stderr.strip()[-1000:]}"
        )
    return done.stdout


# --- an image into a slot


@dataclass(slots=True)
class Turns:
    """What each turn took, in seconds, and held at most, in bytes, by who it was."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)

    def add(self, who: str, told: Mapping[str, float]) -> None:
        self.seconds.setdefault(who, []).append(told["seconds"])
        self.peaks.setdefault(who, []).append(told.get("peak", 0.0) / MB)

    def typical(self, *whose: str) -> dict[str, float]:
        return {who: median(self.seconds[who]) for who in whose if who in self.seconds}

    def ratios(self, other: str) -> tuple[float, ...]:
        return tuple(
            ours / theirs for ours, theirs in zip(self.seconds[OURS], self.seconds[other], strict=True)
        )


def into_slot(site: Site, turns: int, cache: Path) -> list[Figure]:
    image, other = site.folder / "image", site.folder / "other"
    os_images.mixed_image(image, IMAGE_BYTES)
    os_images.noise_image(other, IMAGE_BYTES)
    bundle, built = os_images.bundle_of(image, cache)
    site.publish(bundle, built)
    slots = {RUNNING: other, IDLE: site.folder / "slot"}
    for path in slots.values():
        fill(path)
    known = os_images.manifest_of(other)
    took = Turns()
    with theirs(image, slots[IDLE], cache / bundle.stem, cache) or nullcontext() as peer:
        for turn in range(turns + 1):
            told = {OURS: one_turn(site, built, slots, known), FIRST: one_turn(site, built, slots, None)}
            for name, compression in PEERS.items():
                if peer:
                    os.sync()
                    told[name] = peer.ask(compression)
            told[DD] = copy(image, slots[IDLE])
            for who, each in told.items():
                if turn:  # the first one warms everything up
                    took.add(who, each)
    return figures_of(took)


def fill(path: Path) -> None:
    """Give a slot's file all its blocks: a partition has them, too."""
    with path.open("ab") as out:
        at = out.tell()
        while at < SLOT_BYTES:
            at += out.write(b"\xff" * min(os_images.PIECE, SLOT_BYTES - at))


def theirs(image: Path, slot: Path, folder: Path, cache: Path) -> rauc.Rauc | None:
    try:
        return rauc.Rauc(rauc.make_bundles(image, folder, cache), slot, cache)
    except PeerUnavailable as error:
        print(f"make bench: goes on without the peer: {error}", flush=True)
        return None


def one_turn(site: Site, built: Built, slots: Mapping[str, Path], known: Bundle | None) -> dict[str, float]:
    """An update from a system that has nothing of the new one; `known` where it was installed by us."""
    os.sync()
    manifest = known.encode() if known else b""
    running = SlotRecord("0.9.0", bundle_digest(manifest), "good", IMAGE_BYTES, cold_boot_seen=True)
    return site.update(built, slots, running, manifest)


def copy(image: Path, slot: Path) -> dict[str, float]:
    os.sync()
    began = time.monotonic()
    run("dd", f"if={image}", f"of={slot}", "bs=1M", "conv=fsync,notrunc", "status=none")
    return {"seconds": time.monotonic() - began}


def figures_of(took: Turns) -> list[Figure]:
    figures = [
        Figure(
            "200 MB image into a slot, read back", "s", tuple(took.seconds[OURS]), None, took.typical(*PEERS, DD),
            "ours fetches over TLS and reads back; theirs have a file, and do not",
        )
    ]  # fmt: skip
    for name in PEERS:
        if name in took.seconds:
            aim = 1.0 if name == next(iter(PEERS)) else None
            figures.append(
                Figure(f"200 MB image into a slot: our time by that of {name}", "×", took.ratios(name), aim)
            )
    peaks = tuple(took.peaks[OURS] + took.peaks[FIRST])
    its = {name: max(took.peaks[name]) for name in PEERS if name in took.peaks}
    return [
        *figures,
        Figure(
            "200 MB image into a slot, of a node whose system we have not installed", "s", tuple(took.seconds[FIRST]),
            note="what runs is read once, whole",
        ),
        Figure("peak memory of an update with a 200 MB image", "MB RSS", peaks, 40.0, its),
    ]  # fmt: skip


# --- an image in which one package changed


def one_package(site: Site) -> list[Figure]:
    missing = packages.missing()
    if missing:
        raise MachineError("no-packages", f"they need the packages {' '.join(missing)}")
    debs = Path(os.environ.get("INSTAR_OS_CACHE") or Path(tempfile.gettempdir()) / "instar-os-cache")
    old = variant.make("1.0.0", site.folder / "old", debs, extra=package(1, debs))
    new = variant.make("1.0.1", site.folder / "new", debs, extra=package(0, debs))
    site.publish(new.bundle, new.built)
    slots = {RUNNING: site.folder / "old.slot", IDLE: site.folder / "new.slot"}
    shutil.copy(old.root, slots[RUNNING])
    for path in slots.values():
        fill(path)
    (site.folder / "esp").mkdir(exist_ok=True)
    shutil.copy(old.kernel, site.folder / "esp" / f"{RUNNING}.efi")
    running = SlotRecord(
        "1.0.0", old.built.custom["digest"], "good", old.root.stat().st_size, cold_boot_seen=True
    )
    told = site.update(new.built, slots, running, b"")
    whole = new.root.stat().st_size + new.kernel.stat().st_size
    share = told["fetched"] / whole * 100
    note = f"{told['fetched'] / MB:.2f} MB of {whole / MB:.1f} MB; the whole bundle has {new.built.length / MB:.1f} MB"
    return [Figure(f"fetched where {PACKAGE} alone has changed", "% of the images", (share,), 5.0, {}, note)]


def package(number: int, cache: Path) -> dict[str, bytes]:
    """The package's library, by its path in the image: the newest version (0), or the one before (1)."""
    lines = packages.run("apt-cache", "madison", PACKAGE).splitlines()
    versions = list(dict.fromkeys(line.split("|")[1].strip() for line in lines))
    if len(versions) < 2:
        raise MachineError("no-packages", f"apt knows but one version of {PACKAGE}")
    tree = packages.unpacked([f"{PACKAGE}={versions[number]}"], cache)
    files = [path for path in sorted(tree.rglob("*.so.*")) if path.is_file() and not path.is_symlink()]
    return {f"{LIBRARY}/{path.name}": path.read_bytes() for path in files}
