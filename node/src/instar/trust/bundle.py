"""A system bundle: a root image and a kernel image in chunks, in one file (docs/os-slots.md).

    INSTAROS1\\n  u32 length of the manifest, big-endian  manifest (JSON)  frames, one after the other

The **bundle digest** is the SHA-384 of the manifest's bytes; the signed target `os/<name>-<version>.bundle` carries
it in `custom`. The manifest holds the SHA-256 of each image and of each chunk, so every byte that is used is
covered by the signature, whatever the size, and wherever the chunk came from.

An image is cut where the CRC-32 of a block of 4,096 bytes says so: the same bytes are the same chunk also when
they have moved by whole blocks, so a node finds in its running slot most of what the next image needs.
A chunk of zeros has no frame.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from instar.core.errors import InputError
from instar.core.releases import version_key
from instar.trust.fields import Fields

MAGIC = b"INSTAROS1\n"
LENGTH = struct.Struct(">I")
HEAD = len(MAGIC) + LENGTH.size
FORMAT, KIND, CODE = 1, "os", "bad-bundle"
BLOCK = 4096
FEWEST, MOST = 4, 64  # blocks of a chunk
CUT = 0xF  # a block whose CRC-32 has none of these bits ends a chunk
MAX_MANIFEST, MAX_CHUNKS = 16 << 20, 1 << 20  # bytes, of an image of about 16 GiB: a node holds it in memory
MAX_IMAGE = 1 << 40  # bytes
ROLES = ("root", "kernel")


class Chunk(NamedTuple):
    """`size` bytes of an image from `offset`; its frame is `length` bytes from `at`, counted behind the
    manifest. `length` 0: all zeros."""

    offset: int
    size: int
    sha256: str
    at: int
    length: int


class Image(NamedTuple):
    role: str  # root | kernel
    size: int
    sha256: str
    chunks: tuple[Chunk, ...]


class Bundle(NamedTuple):
    """`compatible` names the hardware that it fits; on a model in `deny_kexec` it is started by reboot only."""

    name: str
    version: str
    compatible: tuple[str, ...]
    arch: str
    min_version: str  # the oldest system that may take it; '' for any
    deny_kexec: tuple[str, ...]
    images: tuple[Image, ...]

    def image(self, role: str) -> Image:
        return next(image for image in self.images if image.role == role)

    def encode(self) -> bytes:
        """The manifest's bytes; the same bundle gives the same ones."""
        value = {
            "format": FORMAT,
            "name": self.name,
            "version": self.version,
            "compatible": list(self.compatible),
            "arch": self.arch,
            "min_version": self.min_version,
            "deny_kexec": list(self.deny_kexec),
            "images": [
                {
                    "role": image.role,
                    "size": image.size,
                    "sha256": image.sha256,
                    "chunks": [[chunk.size, chunk.sha256, chunk.length] for chunk in image.chunks],
                }
                for image in self.images
            ],
        }
        return json.dumps(value, separators=(",", ":")).encode("ascii")


def bundle_digest(manifest: bytes | memoryview) -> str:
    return hashlib.sha384(manifest).hexdigest()


def manifest_length(head: bytes) -> int:
    """From the first HEAD bytes of a bundle. Raises InputError `bad-bundle`."""
    if len(head) != HEAD or not head.startswith(MAGIC):
        raise InputError(CODE, "cannot read the bundle: it does not begin as one")
    length = int(LENGTH.unpack_from(head, len(MAGIC))[0])
    if not 0 < length <= MAX_MANIFEST:
        raise InputError(CODE, f"cannot read the bundle: a manifest of {length} bytes")
    return length


def decode(manifest: bytes) -> Bundle:
    """Read a manifest. Raises InputError `bad-bundle`, `bad-version`: images, chunks and frames leave no gap."""
    fields = Fields.decode(manifest, "the bundle's manifest", CODE)
    if fields.get("format", int) != FORMAT:
        raise fields.error(f"expected 'format' to be {FORMAT}")
    name, version, least = fields.get("name", str), fields.get("version", str), fields.get("min_version", str)
    version_key(version)
    if least:
        version_key(least)
    at, images = 0, []
    for value in fields.get("images", list):
        image, at = _image(Fields(value, "an image of the bundle", CODE), at)
        images.append(image)
    if [image.role for image in images] != list(ROLES):
        raise fields.error(f"expected the images {', '.join(ROLES)}, in this order")
    compatible = _words(fields, "compatible")
    if not name or not compatible:
        raise fields.error("expected a name, and hardware that it is compatible with")
    deny = _words(fields, "deny_kexec")
    return Bundle(name, version, compatible, fields.get("arch", str), least, deny, tuple(images))


def _image(fields: Fields, at: int) -> tuple[Image, int]:
    size, rows = fields.get("size", int), fields.get("chunks", list)
    if not 0 < size <= MAX_IMAGE or len(rows) > MAX_CHUNKS:
        raise fields.error(f"an image of {size} bytes in {len(rows)} chunks")
    chunks, offset = [], 0
    for row in rows:
        if not isinstance(row, list) or [type(each) for each in row] != [int, str, int]:
            raise fields.error("expected a chunk to be [size, sha256, length]")
        count, sha256, length = row
        whole = 0 < count <= MOST * BLOCK and 0 <= length <= 2 * MOST * BLOCK
        if not whole or len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise fields.error(f"a chunk of {count} bytes in a frame of {length}")
        chunks.append(Chunk(offset, count, sha256, at, length))
        offset, at = offset + count, at + length
    if offset != size:
        raise fields.error(f"its chunks have {offset} bytes together, and it has {size}")
    return Image(fields.get("role", str), size, fields.hexadecimal("sha256", 64), tuple(chunks)), at


def _words(fields: Fields, name: str) -> tuple[str, ...]:
    found = fields.get(name, list)
    if not all(isinstance(word, str) and word for word in found):
        raise fields.error(f"expected {name!r} to be a list of words")
    return tuple(found)


def ends(count: int, block: bytes | memoryview) -> bool:
    """The one rule by which images are cut: whether `block`, the `count`-th of its chunk, is the last one."""
    return count >= FEWEST and (count == MOST or not zlib.crc32(block) & CUT)


def cut(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Join an image's blocks (each of BLOCK bytes, the last may be shorter) to chunks, by that rule."""
    held: list[bytes] = []
    for block in blocks:
        held.append(block)
        if ends(len(held), block):
            yield b"".join(held)
            held = []
    if held:
        yield b"".join(held)
