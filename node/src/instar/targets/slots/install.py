"""A bundle into the slot that does not run: `stage` and `verify` of a system update.

The order that must hold: everything that can be refused is refused first. Then the firmware is made to prefer the
slot that runs, its fallback image included, and the other slot loses its kernel image: so at every moment the
firmware finds nothing but whole systems. The root image is written, and read back from the disk; only then the
kernel image gets its place. A slot that holds the very bundle already is read back in place of being written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from instar.core.errors import MachineError, ServerUnreachable, TrustError
from instar.core.journal import Begin, Progress, Reason
from instar.engine.fetch import Pace
from instar.engine.target import Failed, Outcome
from instar.host.boot import esp
from instar.host.boot.slots import Slot, other
from instar.host.disks import check_space
from instar.host.files import failed, make_folder, remove_tree
from instar.host.points import reach
from instar.targets.kit import Kit
from instar.targets.slots.checks import check_bundle, check_promise, check_state
from instar.targets.slots.ledger import Ledger
from instar.targets.slots.platform import Platform, SystemProgress, Tell
from instar.targets.slots.source import Frames, Head, Place, Ranges, index, known, read_head
from instar.targets.slots.writer import Writer, begun, check_slot
from instar.trust.bundle import HEAD, Bundle, Chunk, Image

KERNEL = "kernel.efi"
TOLD_S = 0.25  # between two words on the progress
SOURCE_S = 3000.0  # a source that an operator named must answer within this, or it is said why it did not
TURN_S = (
    300.0  # a slow transfer is gone on with in another turn, from its checkpoint: others have theirs between
)
LEAST_TURN_S = 10.0  # of one that ends early since somebody waits: it must get on all the same
SLOW = "slow"

Waited = Callable[[], bool]
"""Whether the updater has something else to do."""


class Offer(NamedTuple):
    """A bundle, and where its frames come from."""

    ranges: Ranges
    path: str
    head: Head

    @property
    def bundle(self) -> Bundle:
        return self.head.bundle


class Turn:
    """Keeps to the rate, and ends when it has lasted long enough."""

    def __init__(self, kit: Kit, waited: Waited) -> None:
        self._now, self._waited = kit.clock.monotonic, waited
        self._pace = Pace(kit.settings.network.rate_bytes_s, kit.clock.monotonic, kit.sleep)
        self._begin = self._now()

    def spend(self, count: int) -> None:
        """Raises ServerUnreachable `slow` at the end."""
        self._pace.spend(count)
        lasted = self._now() - self._begin
        if lasted > TURN_S or (lasted > LEAST_TURN_S and self._waited()):
            raise ServerUnreachable(SLOW, "the transfer is slow, and goes on from where it is")


class Meter:
    """Counts what came, and tells who follows. `done` and `reused` are bytes of the root image."""

    def __init__(self, kit: Kit, tell: Tell, tx: str, slot: str, total: int, turn: Turn) -> None:
        self._clock, self._tell, self._what, self._total = kit.clock, tell, (tx, slot), total
        self._turn, self._next, self.fetched = turn, 0.0, 0
        self.position: Callable[[], tuple[int, int]] = lambda: (0, 0)  # done, reused

    def spend(self, count: int) -> None:
        """Raises ServerUnreachable `slow` when this turn is over."""
        self.fetched += count
        self.tell(*self.position())
        self._turn.spend(count)

    def tell(self, done: int, reused: int) -> None:
        """At most every TOLD_S, and at the end."""
        now = self._clock.monotonic()
        if now < self._next and done < self._total:
            return
        self._next = now + TOLD_S
        self._tell(SystemProgress(*self._what, done, self._total, self.fetched, reused))


class Install:
    """`waited` may end a turn of a transfer early."""

    def __init__(
        self, kit: Kit, platform: Platform, ledger: Ledger, tell: Tell, waited: Waited = lambda: False
    ) -> None:
        self.kit, self.platform, self.ledger, self.tell, self.waited = kit, platform, ledger, tell, waited

    def stage(self, progress: Progress) -> Outcome:
        begin, ledger = progress.begin, self.ledger
        slot = ledger.idle()
        running = ledger.record(other(slot))
        overridden = check_state(begin, running)
        offer = self._offer(progress, slot, turn := Turn(self.kit, self.waited))
        bundle = offer.bundle
        check_bundle(bundle, self.platform, self.platform.slots[slot], running, self._oldest())
        root = bundle.image("root")
        meter = Meter(self.kit, self.tell, begin.tx, slot, root.size, turn)
        data = {"slot": slot, "deny_kexec": list(bundle.deny_kexec)}
        if holds := self._holds(slot, bundle, meter):
            self._bring_kernel(slot, begin, offer, meter)
            reused = root.size
        else:
            reused = self._write(slot, begin, offer, meter)
        fetched = offer.head.fetched + meter.fetched
        return Outcome(
            {**data, "skipped": holds, "bytes": {"fetched": fetched, "reused": reused}}, overridden
        )

    def _oldest(self) -> str:
        return self.kit.settings.os.min_bundle_version

    # --- what is offered

    def _offer(self, progress: Progress, slot: str, turn: Turn) -> Offer:
        """Raises TrustError `wish-differs`, `altered-bundle`; ServerUnreachable."""
        begin, server = progress.begin, self.kit.server
        target = server.trusted_target(begin.target)
        check_promise(begin, target)
        try:
            found = server.elsewhere(begin.source) if begin.source else (server.source(), target.path)
            kept = self.ledger.manifest(slot) if self.ledger.record(slot).digest == begin.digest else None
            head = _head(kept) if kept else read_head(*found, begin.digest, target.length, turn.spend)
            offer = Offer(*found, head)
        except ServerUnreachable as error:
            if begin.source and self._is_late(progress):
                raise Failed(Reason(error.code, error.text), blame=False) from None
            raise
        if offer.bundle.version != begin.version:
            text = (
                f"{begin.target}: expected version {begin.version}, its manifest says {offer.bundle.version}"
            )
            raise TrustError("wish-differs", text)
        return offer

    def _is_late(self, progress: Progress) -> bool:
        clock, began = self.kit.clock, progress.began
        return began.boot_id != clock.boot_id() or clock.boottime() - began.boottime > SOURCE_S

    # --- a slot that has it already

    def _holds(self, slot: str, bundle: Bundle, meter: Meter) -> bool:
        """Whether the root image lies there whole, as the disk says."""
        record = self.ledger.record(slot)
        if record.state not in ("installed", "good") or self.ledger.manifest(slot) != bundle:
            return False
        try:
            check_slot(bundle.image("root"), self.platform.slots[slot], lambda done: meter.tell(done, done))
        except MachineError as error:
            if error.code != "not-as-written":
                raise
            return False
        return True

    def _bring_kernel(self, slot: str, begin: Begin, offer: Offer, meter: Meter) -> None:
        """Fetch the kernel image, unless it is in its place."""
        kernel = offer.bundle.image("kernel")
        if self._is_placed(slot, kernel):
            self._check_room(slot, kernel, begin, new=0)
        else:
            self._check_room(slot, kernel, begin)
            self._save(kernel, begin, offer, meter)

    def _is_placed(self, slot: str, kernel: Image) -> bool:
        try:
            esp.check_file(self.platform.boot.kernel(slot), kernel.size, kernel.sha256)
        except MachineError:
            return False
        return True

    def _check_room(self, slot: str, kernel: Image, begin: Begin, new: int = 1) -> None:
        """For `new` images of the slot, and for what the firmware falls back to. Raises MachineError `esp-full`,
        `no-space`, `disk-failed`."""
        boot, came = self.platform.boot, esp.size_of(self._staging(begin) / KERNEL)
        freed = esp.size_of(boot.kernel(slot)) if new else 0
        esp.check_room(self.platform.esp, kernel.size, new + boot.copies, freed)
        check_space(self.kit.layout.state, max(0, kernel.size - came))

    # --- writing it

    def _write(self, slot: str, begin: Begin, offer: Offer, meter: Meter) -> int:
        """Both images, the kernel's into the staging folder. How many bytes the running slot had."""
        root, running = offer.bundle.image("root"), self.platform.slots[other(slot)]
        self._check_room(slot, offer.bundle.image("kernel"), begin)
        unpack = zstd_decompressor()
        start = self._poison(slot, begin, offer.bundle)
        writer = Writer(
            root,
            self.platform.slots[slot],
            running,
            self._local("root", running),
            unpack,
            self.kit.disk,
        )
        meter.position = lambda: (max(start, writer.done), writer.reused)
        writer.write(start, self._frames(offer, meter), lambda done: self._checkpoint(slot, done, meter))
        self._checkpoint(slot, root.size, meter)
        self._save(offer.bundle.image("kernel"), begin, offer, meter)
        return writer.reused

    def _poison(self, slot: str, begin: Begin, bundle: Bundle) -> int:
        """Make the slot not bootable, by name and by record. From which byte its image is to be written on."""
        self.platform.boot.prefer(other(slot))
        reach("os:preferred-running")
        self.platform.boot.forget(slot)
        reach("os:poisoned")
        old = self.ledger.record(slot)
        if (old.state, old.digest) == ("writing", begin.digest):
            root = bundle.image("root")
            starts = [*(chunk.offset for chunk in root.chunks), root.size]
            return max((start for start in starts if start <= old.done), default=0)
        self.ledger.begin(slot, begin.version, bundle)
        return 0

    def _checkpoint(self, slot: str, done: int, meter: Meter) -> None:
        self.ledger.mark(slot, done=done)
        meter.tell(*meter.position())

    def _frames(self, offer: Offer, meter: Meter) -> Callable[[list[Chunk]], Frames]:
        return lambda needed: Frames(offer.ranges, offer.path, offer.head.frames, needed, meter.spend)

    def _save(self, kernel: Image, begin: Begin, offer: Offer, meter: Meter) -> None:
        """The kernel image into the staging folder, chunk by chunk checked. It goes on from what an earlier turn has
        brought; what a power cut has taken of that is found missing, and comes once more."""
        staging, disk = self._staging(begin), self.kit.disk
        make_folder(staging, 0o700, disk)
        path = staging / KERNEL
        try:
            if not (start := begun(kernel, path)):
                disk.write_new(path, b"", 0o600)
            running, into = self._running_kernel(), Slot("kernel", path, 0, kernel.size)
            local = self._local("kernel", running) if running else {}
            writer = Writer(kernel, into, running, local, zstd_decompressor(), disk)
            writer.write(start, self._frames(offer, meter), lambda _: None)
            disk.sync_folder(staging)
        except OSError as error:
            raise failed("write", path, error) from error

    def _running_kernel(self) -> Slot | None:
        path = self.platform.boot.kernel(self.ledger.running())
        size = esp.size_of(path)
        return Slot("running kernel", path, 0, size) if size else None

    def _local(self, role: str, there: Slot) -> dict[str, Place]:
        """What the running system has of an image: by its manifest, or by reading it where that is not kept. Nothing,
        where it cannot be read: then all is fetched."""
        running = self.ledger.running()
        if (bundle := self.ledger.manifest(running)) is not None:
            return known(bundle.image(role))
        size = self.ledger.record(running).size if role == "root" else there.size
        try:
            return index(there, size or there.size)
        except MachineError:
            return {}

    def _staging(self, begin: Begin) -> Path:
        return self.kit.layout.staging / begin.tx

    # --- the disk's word

    def verify(self, progress: Progress) -> Outcome:
        """Both images from the disk itself; the kernel image goes to its place last."""
        begin, slot = progress.begin, str(progress.data["slot"])
        bundle = self.ledger.manifest(slot)
        if bundle is None:
            raise MachineError("no-manifest", f"cannot check slot {slot}: the manifest of its bundle is gone")
        try:
            self.read_back(slot, bundle, begin.tx)
        except MachineError as error:
            if error.code == "not-as-written":
                self.platform.boot.forget(slot)
                self.ledger.mark(slot, state="bad", why=error.text)
            raise
        reach("os:read-back")
        self._place(slot, begin, bundle.image("kernel"))
        reach("os:placed")
        if self.ledger.record(slot).state == "writing":
            self.ledger.mark(slot, state="installed", why="")
        remove_tree(self._staging(begin), self.kit.disk)
        return Outcome()

    def read_back(self, slot: str, bundle: Bundle, tx: str) -> None:
        """Raises MachineError `not-as-written`."""
        root = bundle.image("root")
        meter = Meter(self.kit, self.tell, tx, slot, root.size, Turn(self.kit, self.waited))
        check_slot(root, self.platform.slots[slot], lambda done: meter.tell(done, 0))

    def _place(self, slot: str, begin: Begin, kernel: Image) -> None:
        place, source = self.platform.boot.kernel(slot), self._staging(begin) / KERNEL
        if self._is_placed(slot, kernel):
            esp.sync(place, self.kit.disk)
            return
        try:
            with source.open("rb") as file:
                esp.place(file, kernel.size, kernel.sha256, place, self.kit.disk)
        except OSError as error:
            raise failed("read", source, error) from error


def _head(bundle: Bundle) -> Head:
    """Of a bundle whose manifest is here already."""
    return Head(bundle, HEAD + len(bundle.encode()), 0)


def zstd_decompressor() -> Callable[[bytes, int], bytes]:
    """Loaded when it is needed: it may bring ctypes with it. Raises MachineError `no-zstd`."""
    from instar.host import zstd

    return zstd.decompressor()
