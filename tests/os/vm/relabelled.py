"""Bundles with the images of another one, and other words about them: nothing is compressed anew."""

from __future__ import annotations

from typing import Any

from instar.trust import bundle as bundles
from instar.trust.bundle import HEAD, LENGTH, MAGIC
from instar_lab.osimage.variant import Image
from instar_server.trust.bundle import describe
from tests.os.vm.world import World


def publish(world: World, image: Image, signed: dict[str, Any] | None = None, **differs: Any) -> str:
    """Publish `image` under another manifest, of which the fields `differs` are not as usual; its name. A `name` of
    its own is one of them. `signed`: what is signed of it that does not fit its manifest."""
    data = image.bundle.read_bytes()
    end = HEAD + bundles.manifest_length(data[:HEAD])
    manifest = bundles.decode(data[HEAD:end])._replace(**differs)
    head = manifest.encode()
    file = world.folder / f"{manifest.name}-{manifest.version}.bundle"
    file.write_bytes(MAGIC + LENGTH.pack(len(head)) + head + data[end:])
    built = describe(file)
    return world.publish_built(built._replace(custom={**built.custom, **(signed or {})}), file)
