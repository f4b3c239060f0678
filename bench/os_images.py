"""What is installed by the figures of system updates: images that are the same on every run of one machine."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from instar.core.errors import MachineError
from instar.trust.bundle import BLOCK, Bundle, Chunk, Image, cut
from instar_lab.osimage import uki
from instar_lab.osimage.packages import STUB
from instar_server.trust.bundle import About, Built, build, describe

FILES = Path("/usr/lib")
ZEROS_EVERY, ZEROS = 16 << 20, 1 << 20  # bytes: a file system is not quite full
ABOUT = About("bench", "1.0.0", ("bench",), "x86_64")
PIECE = 1 << 20


def mixed_image(path: Path, size: int) -> None:
    """`size` bytes as they lie in a root file system that is not compressed: this machine's own files in the order
    of their names, each begun with a block, and some free room. Raises MachineError `too-few-files`."""
    done = zeros = 0
    with path.open("wb") as out:
        for file in _files(FILES):
            data = file.read_bytes()[: size - done]
            out.write(data + bytes(-len(data) % BLOCK))
            done += len(data) + -len(data) % BLOCK
            if done - zeros >= ZEROS_EVERY and size - done >= ZEROS:
                out.write(bytes(ZEROS))
                zeros = done = done + ZEROS
            if done >= size:
                return
    raise MachineError(
        "too-few-files", f"cannot build an image: expected {size} bytes below {FILES}, got {done}"
    )


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                yield path


def noise_image(path: Path, size: int) -> None:
    """Another system: nothing of it is in any other image."""
    source = random.Random(1)
    with path.open("wb") as out:
        for at in range(0, size, PIECE):
            out.write(source.randbytes(min(PIECE, size - at)))


def bundle_of(image: Path, cache: Path) -> tuple[Path, Built]:
    """The bundle of an image and of a kernel image that is next to nothing. Compressing lasts minutes: it is kept
    in `cache`. Raises MachineError, InputError."""
    with image.open("rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    out, kernel = cache / f"{name}.bundle", cache / f"{name}.efi"
    if out.exists():
        return out, describe(out)
    if shutil.disk_usage(cache).free < 4 * image.stat().st_size:
        raise MachineError("no-space", f"cannot build {out}: too little room")
    print("building a bundle: this takes some minutes, once", flush=True)
    kernel.write_bytes(
        uki.build(
            STUB.read_bytes(), {name: bytes(BLOCK) for name in (".osrel", ".cmdline", ".initrd", ".linux")}
        )
    )
    return out, build(ABOUT, image, kernel, out)


def manifest_of(image: Path) -> Bundle:
    """What a node keeps of a system that it has installed, but for the lengths of the frames."""
    chunks, whole, offset = [], hashlib.sha256(), 0
    with image.open("rb") as file:
        for data in cut(iter(lambda: file.read(BLOCK), b"")):
            chunks.append(Chunk(offset, len(data), hashlib.sha256(data).hexdigest(), offset, 1))
            whole.update(data)
            offset += len(data)
    root = Image("root", offset, whole.hexdigest(), tuple(chunks))
    kernel = Image("kernel", BLOCK, "0" * 64, (Chunk(0, BLOCK, "0" * 64, len(chunks), 1),))
    return Bundle("bench", "0.9.0", ABOUT.compatible, ABOUT.arch, "", (), (root, kernel))
