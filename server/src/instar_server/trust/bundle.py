"""Build a system bundle (instar.trust.bundle says what it is): the same images give the same bytes.

Memory does not depend on the images: frames go to a file beside the result until the manifest is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from instar.core.errors import InputError, MachineError
from instar.core.releases import version_key
from instar.trust import bundle as bundles
from instar.trust import pe
from instar.trust.bundle import BLOCK, HEAD, KIND, LENGTH, MAGIC, Bundle, Chunk, Image
from instar_server.domain.systems import target_of
from instar_server.trust.files import DISK

LEVEL = 19
NEEDED = (".linux", ".initrd", ".cmdline")


class About(NamedTuple):
    """What the operator says of a bundle; see Bundle."""

    name: str
    version: str
    compatible: tuple[str, ...]
    arch: str
    min_version: str = ""
    deny_kexec: tuple[str, ...] = ()


class Built(NamedTuple):
    """`path` is the TUF target path, `custom` what is signed with it."""

    path: str
    length: int
    sha256: str
    custom: dict[str, Any]


def build(
    about: About, root: Path, kernel: Path, out: Path, progress: Callable[[int, int], None] = lambda *_: None
) -> Built:
    """Write the bundle to `out`, replacing what was there. `progress(done, total)` in bytes of the images.

    Raises InputError `bad-bundle`, `bad-pe`, `bad-path`, `bad-version`; MachineError `disk-failed`. What was there
    stays then, and nothing is left beside it.
    """
    _check_about(about)
    _check_kernel(kernel)
    try:
        total = root.stat().st_size + kernel.stat().st_size
        with tempfile.TemporaryFile(dir=out.parent) as frames:
            images: list[Image] = []
            for role, path in zip(bundles.ROLES, (root, kernel), strict=True):
                before = sum(image.size for image in images)
                images.append(_image(role, path, frames, _shifted(progress, before, total)))
            made = Bundle(
                about.name, about.version, about.compatible, about.arch, about.min_version, about.deny_kexec,
                tuple(images),
            )  # fmt: skip
            return _write(out, made, _manifest(made), frames)
    except OSError as error:
        raise MachineError("disk-failed", f"cannot build {out}: {error.strerror} {error.filename}") from error


def describe(path: Path) -> Built:
    """What a bundle file is, its whole content checked against its manifest's lengths.

    Raises InputError `bad-bundle`, `bad-path`, MachineError `disk-failed`.
    """
    try:
        with path.open("rb") as file:
            manifest = file.read(bundles.manifest_length(file.read(HEAD)))
            made = bundles.decode(manifest)
            frames = sum(chunk.length for image in made.images for chunk in image.chunks)
            if path.stat().st_size != HEAD + len(manifest) + frames:
                raise InputError("bad-bundle", f"cannot use {path.name}: it is cut off, or has too much")
            file.seek(0)
            return _built(
                made, manifest, hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
            )
    except OSError as error:
        raise MachineError("disk-failed", f"cannot read {path}: {error.strerror}") from error


def _check_about(about: About) -> None:
    """Before the images are read, which may take minutes. Raises InputError `bad-bundle`, `bad-path`, `bad-version`."""
    target_of(about.name, about.version)
    if about.min_version:
        version_key(about.min_version)
    if not about.compatible or not all((*about.compatible, *about.deny_kexec)):
        text = (
            f"expected names of hardware, got {list(about.compatible)!a:.80}, {list(about.deny_kexec)!a:.80}"
        )
        raise InputError("bad-bundle", f"cannot build a bundle: {text}")


def _manifest(made: Bundle) -> bytes:
    """Its bytes; what a node would refuse is not built. Raises InputError `bad-bundle`."""
    manifest = made.encode()
    if len(manifest) > bundles.MAX_MANIFEST:
        text = f"expected a manifest of {bundles.MAX_MANIFEST} bytes at most, got {len(manifest)}"
        raise InputError(
            "bad-bundle", f"cannot build a bundle: {text}: a node would refuse it; take a smaller image"
        )
    bundles.decode(manifest)
    return manifest


def _check_kernel(path: Path) -> None:
    try:
        with path.open("rb") as file:
            found = pe.sections(file)
    except OSError as error:
        raise InputError("bad-pe", f"cannot read {path}: {error.strerror}") from None
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise InputError("bad-pe", f"cannot use {path}: a unified kernel image has {', '.join(missing)}")


def _shifted(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int], None]:
    return lambda count: progress(before + count, total)


def _image(role: str, path: Path, frames: BinaryIO, progress: Callable[[int], None]) -> Image:
    whole, chunks, offset = hashlib.sha256(), [], 0
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False)
    with path.open("rb") as file:
        for data in bundles.cut(_blocks(file)):
            whole.update(data)
            frame = compressor.compress(data) if any(data) else b""
            at = frames.tell()
            frames.write(frame)
            chunks.append(Chunk(offset, len(data), hashlib.sha256(data).hexdigest(), at, len(frame)))
            offset += len(data)
            progress(offset)
    return Image(role, offset, whole.hexdigest(), tuple(chunks))


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _write(out: Path, made: Bundle, manifest: bytes, frames: BinaryIO) -> Built:
    temporary = out.with_name(f".{out.name}.new")
    try:
        with temporary.open("wb") as file:
            file.write(MAGIC + LENGTH.pack(len(manifest)) + manifest)
            frames.seek(0)
            shutil.copyfileobj(frames, file, 1 << 20)
            length = file.tell()
            file.flush()
            os.fsync(file.fileno())
        with temporary.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        built = _built(made, manifest, sha256, length)
        os.replace(temporary, out)
        DISK.sync(out.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # it may not be there; the first error is why
            temporary.unlink()
        raise
    return built


def _built(made: Bundle, manifest: bytes, sha256: str, length: int) -> Built:
    custom = {
        "kind": KIND, "name": made.name, "version": made.version, "digest": bundles.bundle_digest(manifest),
        "compatible": list(made.compatible), "arch": made.arch,
    }  # fmt: skip
    return Built(target_of(made.name, made.version), length, sha256, custom)
