"""System bundles: the same images give the same bytes, every byte is covered, and what moved is found again."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.core.errors import InputError
from instar.host import zstd
from instar.trust import bundle as bundles
from instar.trust.bundle import BLOCK, FEWEST, HEAD, MOST, Bundle
from instar_server.trust.bundle import About, build, describe
from tests.node.boot.test_disks import image as kernel_image

ABOUT = About("lab", "1.2.0", ("qemu",), "x86_64", "1.0.0", ("old-board",))
KERNEL = kernel_image({".linux": b"kernel" * 900, ".initrd": b"files" * 800, ".cmdline": b"quiet"})


def blocks(data: bytes) -> Iterator[bytes]:
    return (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))


def noise(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    root, kernel = tmp_path / "root.img", tmp_path / "kernel.efi"
    root.write_bytes(noise(500_000) + bytes(200 * BLOCK) + b"text " * 50_000)
    kernel.write_bytes(KERNEL)
    return root, kernel


def read(path: Path) -> tuple[Bundle, bytes]:
    """The bundle and its frames, as a node reads them."""
    data = path.read_bytes()
    end = HEAD + bundles.manifest_length(data[:HEAD])
    return bundles.decode(data[HEAD:end]), data[end:]


def test_images_come_out_as_they_went_in(sources: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "b"
    built = build(ABOUT, *sources, out)
    bundle, frames = read(out)
    decompress = zstd.decompressor()
    for image, source in zip(bundle.images, sources, strict=True):
        data = b""
        for chunk in image.chunks:
            frame = frames[chunk.at : chunk.at + chunk.length]
            content = decompress(frame, chunk.size) if chunk.length else bytes(chunk.size)
            assert hashlib.sha256(content).hexdigest() == chunk.sha256
            data += content
        assert data == source.read_bytes()
        assert hashlib.sha256(data).hexdigest() == image.sha256
    assert built.custom["digest"] == bundles.bundle_digest(bundle.encode())
    assert built.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert (built.path, built.custom["kind"]) == ("os/lab-1.2.0.bundle", "os")
    assert describe(out) == built
    assert any(chunk.length == 0 for chunk in bundle.image("root").chunks)  # the zeros take no room


def test_same_images_give_the_same_bytes(sources: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    assert build(ABOUT, *sources, first) == build(ABOUT, *sources, second)
    assert first.read_bytes() == second.read_bytes()


@given(st.integers(0, 40), st.integers(0, 2**32))
def test_what_moved_by_whole_blocks_is_cut_alike(moved: int, seed: int) -> None:
    data = noise(300 * BLOCK, seed)
    before = {hashlib.sha256(chunk).digest() for chunk in bundles.cut(blocks(data))}
    after = [hashlib.sha256(chunk).digest() for chunk in bundles.cut(blocks(noise(moved * BLOCK, 7) + data))]
    known = sum(chunk in before for chunk in after)
    assert known >= len(before) - 8  # but for what lies around the cut that moved
    for chunk in bundles.cut(blocks(data)):
        assert len(chunk) <= MOST * BLOCK
    assert b"".join(bundles.cut(blocks(data))) == data


def test_chunks_are_neither_tiny_nor_huge() -> None:
    sizes = [len(chunk) // BLOCK for chunk in bundles.cut(blocks(noise(2000 * BLOCK)))]
    assert min(sizes[:-1]) >= FEWEST
    assert 10 < sum(sizes) / len(sizes) < 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format"),
        ({"version": "next"}, "cannot read version"),
        ({"images": []}, "expected the images root, kernel"),
        ({"compatible": []}, "hardware"),
        ({"images": [{"role": "root", "size": 10, "sha256": "0" * 64, "chunks": []}]}, "its chunks have 0"),
        (
            {"images": [{"role": "root", "size": 9, "sha256": "0" * 64, "chunks": [[9, "x", 1]]}]},
            "a chunk of 9 bytes",
        ),
        (
            {"images": [{"role": "root", "size": 9, "sha256": "0" * 64, "chunks": [[9, "0" * 64, -1]]}]},
            "frame of -1",
        ),
        ({"deny_kexec": [1]}, "list of words"),
    ],
)  # fmt: skip
def test_manifest_that_makes_no_sense_is_refused(
    sources: tuple[Path, Path], tmp_path: Path, change: dict[str, object], says: str
) -> None:
    build(ABOUT, *sources, tmp_path / "b")
    value = json.loads(read(tmp_path / "b")[0].encode())
    with pytest.raises(InputError, match=says):
        bundles.decode(json.dumps(value | change).encode())


@given(st.binary(max_size=200))
def test_strange_bytes_break_nothing(data: bytes) -> None:
    with pytest.raises(InputError):
        bundles.decode(data)
    with pytest.raises(InputError):
        bundles.manifest_length(data[:HEAD])


def test_bundle_that_is_cut_off_is_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "b"
    build(ABOUT, *sources, out)
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(InputError, match="cut off"):
        describe(out)


def test_kernel_that_is_none_is_refused_and_nothing_is_left(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    root, kernel = sources
    kernel.write_bytes(kernel_image({".linux": b"x"}))
    with pytest.raises(InputError, match="initrd"):
        build(ABOUT, root, kernel, tmp_path / "b")
    kernel.write_bytes(b"no kernel")
    with pytest.raises(InputError, match="cannot read the kernel image"):
        build(ABOUT, root, kernel, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel.efi", "root.img"]


@pytest.mark.parametrize("way", [zstd._library, zstd._program], ids=["library", "program"])
def test_frames_are_unpacked_within_bounds(way: object) -> None:
    import zstandard

    decompress = way()  # type: ignore[operator]
    if decompress is None:
        pytest.skip("not on this machine")
    frame = zstandard.ZstdCompressor().compress(b"text" * 1000)
    assert decompress(frame, 4000) == b"text" * 1000
    with pytest.raises(InputError, match="cannot unpack a frame"):
        decompress(frame, 3999)
    with pytest.raises(InputError, match="cannot unpack a frame"):
        decompress(b"no frame at all", 100)
