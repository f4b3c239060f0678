"""Tier T2: one real update with every write to its disk on record, and the power cut at hundreds of places of it.

The machine moves from X to Y by a reboot, over a slot that holds an older system. Offline, the disk is then put into
states in which a power cut could have left it, and looked at by a judge that shares no code with the node. The
variables of the firmware lie in a chip of their own and are not replayed: so at every point every kernel image that
an entry or the fallback could start must be whole, and have its whole root.

INSTAR_SEED decides which points are tried; it has a fixed value else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from instar_lab.osimage import blocklog, crashes, disk, offline, recording, variant
from instar_lab.osimage.blocklog import MARK_AT
from instar_lab.osimage.crashes import Epoch, Point, Write
from instar_lab.osimage.offline import FALLBACK, Found, Judge
from instar_lab.osimage.packages import missing
from instar_lab.osimage.recording import Recording
from instar_lab.osimage.variant import Image
from tests.os.vm.world import X, Y, cache

pytestmark = [pytest.mark.os, pytest.mark.xdist_group("vm-replay")]

SEED = 20261121
POINTS, POINTS_OF_A_MISTAKE = 240, 24
OLDEST = "0.9.0"
A, B = "EFI/instar/a.efi", "EFI/instar/b.efi"
# Section of the record -> what is wrong there, and what that does to a kernel image.
MISTAKES = {
    "unsynced": "0 bytes, no kernel image",
    "removed": "its chain leads to cluster",
    "replaced": "its chain leads to cluster",
}


class Seen(NamedTuple):
    """What was found at a point; `fsck` says what fsck.vfat thinks of kernel images there."""

    point: Point
    found: Found
    fsck: dict[str, list[str]]


class Replay(NamedTuple):
    seen: dict[str, list[Seen]]  # by section
    placed: int  # the epoch in which the update went on, with the new kernel image in its place
    after: bool  # whether the record gives the disk that the machine left, to the byte


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where there is some: the disk is changed and looked at hundreds of times."""
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    made = Path(tempfile.mkdtemp(prefix="icr-", dir=where))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def images() -> tuple[Image, Image]:
    if absent := missing():
        reason = f"cannot run a virtual machine: these Debian packages are missing: {', '.join(absent)}"
        if os.environ.get("INSTAR_OS_REQUIRED"):
            pytest.fail(reason)
        pytest.skip(reason)
    return variant.kept(X, cache() / "vm"), variant.kept(Y, cache() / "vm")


@pytest.fixture(scope="module")
def recorded(images: tuple[Image, Image], folder: Path) -> Recording:
    return recording.record(folder / "r", *images)


@pytest.fixture(scope="module")
def replay(images: tuple[Image, Image], recorded: Recording, folder: Path) -> Replay:
    seed = int(os.environ.get("INSTAR_SEED") or SEED)
    print(f"INSTAR_SEED={seed}")
    epochs = list(crashes.epochs(blocklog.Log(recorded.writes).entries()))
    medium = crashes.Medium(disk.copy(recorded.before, folder / "disk"))
    parts = offline.layout(medium.view)
    esp = medium.mirror(*parts.esp, folder / "esp")
    points, section_of = planned(epochs, seed, max(sum(each) for each in (parts.esp, *parts.slots.values())))
    kernels = {each.version: each.kernel for each in images} | {OLDEST: recorded.oldest}
    judge = Judge({hashlib.sha256(path.read_bytes()).hexdigest(): name for name, path in kernels.items()})
    seen: dict[str, list[Seen]] = {}
    for point in crashes.replayed(medium, epochs, points):
        found, said = judge.look(medium.view), offline.fsck(esp)
        harmed = {path: lines for path, lines in said.items() if path.lower().endswith(".efi")}
        seen.setdefault(section_of[point.epoch.number], []).append(Seen(point, found, harmed))
    placed = next(epoch.number for epoch in epochs if "os:placed" in epoch.marks)
    return Replay(seen, placed, medium.view == recorded.after.read_bytes())


def planned(epochs: list[Epoch], seed: int, end: int) -> tuple[list[Point], dict[int, str]]:
    """The points, and the section of each epoch. The data partition lies behind `end`, and is not judged."""

    def judged(write: Write) -> bool:
        return write.offset < end and write.offset != MARK_AT

    points, section_of = [], {}
    for name, within in crashes.sections(epochs).items():
        section_of |= {epoch.number: name for epoch in within}
        wanted = POINTS if name == "update" else POINTS_OF_A_MISTAKE if name in MISTAKES else 1
        points += crashes.plan(within, wanted, seed, judged)
    return points, section_of


def corrupt(seen: list[Seen]) -> list[str]:
    return [
        f"{each.point.name}: {each.found.faults} {each.fsck}"
        for each in seen
        if each.found.faults or each.fsck
    ]


def test_record_gives_the_disk_that_the_machine_left(replay: Replay) -> None:
    assert replay.after


def test_no_power_cut_leaves_a_kernel_image_without_its_system(replay: Replay) -> None:
    seen = [*replay.seen[""], *replay.seen["update"]]
    ways = Counter(tuple(sorted(each.found.kernels.items())) for each in seen)
    print(
        f"{len(seen)} points of {len({each.point.epoch.number for each in seen})} epochs, {len(corrupt(seen))} corrupt"
    )
    assert not corrupt(seen)
    assert len({(each.point.epoch.number, each.point.parts) for each in seen}) >= 200
    # It went through all that there is: the old image, none, the new one, and the new one as the fallback.
    assert set(ways) == {
        ((FALLBACK, X), (A, X), (B, OLDEST)),
        ((FALLBACK, X), (A, X)),
        ((FALLBACK, X), (A, X), (B, Y)),
        ((FALLBACK, Y), (A, X), (B, Y)),
    }


def test_what_is_said_to_be_in_place_stays_there(replay: Replay) -> None:
    """From the moment when the update goes on: no cut takes the kernel image away again."""
    later = [each for each in replay.seen["update"] if each.point.epoch.number > replay.placed]
    assert len(later) > 10
    assert {each.found.kernels.get(B) for each in later} == {Y}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_judge_sees_a_mistake(replay: Replay, mistake: str) -> None:
    seen = replay.seen[mistake]
    faults = [fault for each in seen for fault in each.found.faults]
    print(f"{mistake}: {len(corrupt(seen))} of {len(seen)} points corrupt")
    assert any(MISTAKES[mistake] in fault for fault in faults), faults
