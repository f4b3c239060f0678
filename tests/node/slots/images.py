"""Small systems to install: a root image, a kernel image that names its hash, and the bundle of both."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from instar.core.releases import Release
from instar.trust.bundle import HEAD, manifest_length
from instar_server.trust.bundle import About, Built, build
from tests.node.boot.test_disks import image as kernel_image

MARK = "roothash="


class Image:
    """One version: a root, a kernel that names its hash, both in a bundle. `size` of the root in bytes; `initrd` is
    in the kernel image."""

    def __init__(
        self,
        folder: Path,
        version: str,
        seed: int,
        size: int = 240 << 10,
        initrd: bytes = b"i" * 5000,
        **about: object,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.version = version
        same = size * 5 // 6
        self.root = random.Random(1).randbytes(same) + random.Random(seed).randbytes(size - same)
        self.hash = hashlib.sha256(self.root).hexdigest()
        line = f"quiet {MARK}{self.hash}"
        self.kernel = kernel_image({".linux": b"k" * 5000, ".initrd": initrd, ".cmdline": line.encode()})
        root, kernel, self.bundle = (folder / f"{version}.{kind}" for kind in ("root", "kernel", "bundle"))
        root.write_bytes(self.root)
        kernel.write_bytes(self.kernel)
        said = {"compatible": ("board",), "arch": "x86_64", **about}
        self.built: Built = build(About("lab", version, **said), root, kernel, self.bundle)  # type: ignore[arg-type]

    @property
    def bundle_manifest(self) -> bytes:
        data = self.bundle.read_bytes()
        return data[HEAD : HEAD + manifest_length(data[:HEAD])]

    @property
    def release(self) -> Release:
        return Release(self.version, str(self.built.custom["digest"]))
