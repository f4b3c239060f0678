"""A kernel image that does not come within one turn: the next one goes on from where it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from instar.core.errors import ServerUnreachable
from instar.core.transaction import State
from instar.targets.slots.install import KERNEL
from instar.targets.slots.writer import begun
from instar.trust.bundle import BLOCK, HEAD, MOST, decode
from instar.trust.bundle import Image as Described
from tests.node.slots.images import Image
from tests.node.slots.system import System

PIECE_S = 25.0  # until another 64 KiB have come: 13 of them in a turn
MOST_CHUNK = MOST * BLOCK


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Its kernel image takes four turns."""
    return Image(tmp_path_factory.mktemp("large"), "1.1.0", 3, initrd=random.Random(9).randbytes(3_000_000))


@pytest.fixture
def slow(memory: Path, images: tuple[Image, ...], large: Image) -> Iterator[System]:
    system = System(memory / "s", images[0], large)
    system.power_on()
    plain = system.source_file._pieces

    def pieces(*where: object) -> Iterator[bytes]:
        for piece in plain(*where):  # type: ignore[arg-type]
            system.clock.now += PIECE_S
            yield piece

    system.source_file._pieces = pieces  # type: ignore[method-assign, assignment]
    system.begin("none")
    yield system
    system.close()


def turn(system: System) -> bool:
    """Whether all of it is staged after this one."""
    target, (journal,) = system.target(), system.journals.unfinished()
    try:
        target.stage(journal.progress, journal)
    except ServerUnreachable as error:
        assert error.code == "slow"
        return False
    return True


def kernel_of(image: Image) -> Described:
    return decode(image.bundle_manifest).image("kernel")


def staged(system: System) -> Path:
    return system.layout.staging / "tx-1" / KERNEL


def test_each_turn_brings_more_of_it(slow: System, large: Image) -> None:
    came, turns = [0], 1
    while not turn(slow):
        turns += 1
        assert turns < 8, "it never comes to its end"
        came.append(begun(kernel_of(large), staged(slow)))
        assert came[-1] > came[-2] or slow.records()["b"].done < len(large.root)
    assert turns > 3
    assert staged(slow).read_bytes() == large.kernel
    assert slow.source_file.served < large.bundle.stat().st_size + turns * (MOST_CHUNK + (64 << 10))
    assert slow.go_on().state is State.CONFIRMED
    assert slow.boot.kernel("b").read_bytes() == large.kernel


def test_root_image_that_is_there_is_not_asked_for_again(slow: System, large: Image) -> None:
    while slow.records()["b"].done < len(large.root) or not staged(slow).exists():
        assert not turn(slow)
    asked: list[int] = []
    plain = slow.source_file.stream

    def stream(path: str, start: int, stop: int | None = None) -> object:
        asked.append(start)
        return plain(path, start, stop)

    slow.source_file.stream = stream  # type: ignore[method-assign, assignment]
    turn(slow)
    frames = HEAD + len(large.bundle_manifest)
    assert asked
    assert min(asked) > frames + kernel_of(large).chunks[0].at


@pytest.mark.parametrize("loss", ["tail", "middle", "first", "all", "name"])
def test_what_a_power_cut_has_taken_of_it_comes_once_more(slow: System, large: Image, loss: str) -> None:
    kernel = kernel_of(large)
    while begun(kernel, staged(slow)) < 3 * MOST_CHUNK:
        assert not turn(slow)
    data, path = bytearray(staged(slow).read_bytes()), staged(slow)
    before = begun(kernel, path)
    if loss == "name":
        path.unlink()
    else:
        at = {"tail": before - 100, "middle": before // 2, "first": 8000, "all": 0}[loss]
        data[at : at + 50] = bytes(50)
        path.write_bytes(b"" if loss == "all" else data)
    assert begun(kernel, path) < before
    assert (begun(kernel, path) > 0) == (loss in ("tail", "middle"))
    while not turn(slow):
        assert slow.source_file.served < 3 * large.bundle.stat().st_size
    assert path.read_bytes() == large.kernel
    assert slow.go_on().state is State.CONFIRMED
