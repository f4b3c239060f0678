"""What no server could publish, nobody order, or a node would refuse, is not built; and what was there stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.core.errors import InputError, MachineError
from instar_server.domain import systems
from instar_server.trust.bundle import About, Built, build, describe
from tests.node.boot.test_disks import image
from tests.server.systems import new_node, order, publish, wanted
from tests.server.world import running

KERNEL = image({".linux": b"k" * 5000, ".initrd": b"i" * 5000, ".cmdline": b"quiet"})
BEFORE = b"what was there before"


def attempt(folder: Path, about: About, read: list[int] | None = None) -> Built:
    """Build beside, and over, what is there."""
    root, kernel, out = folder / "root", folder / "kernel", folder / "out.bundle"
    root.write_bytes(bytes(range(256)) * 400)
    kernel.write_bytes(KERNEL)
    out.write_bytes(BEFORE)
    return build(
        about, root, kernel, out, lambda done, _total: (read if read is not None else []).append(done)
    )


def left_alone(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["kernel", "out.bundle", "root"]
    assert (folder / "out.bundle").read_bytes() == BEFORE


@pytest.mark.parametrize(
    ("name", "version", "code"),
    [
        ("", "1.1.0", "bad-path"), ("a/b", "1.1.0", "bad-path"), ("../x", "1.1.0", "bad-path"),
        ("w:x", "1.1.0", "bad-path"), ("web%20", "1.1.0", "bad-path"), ("we b", "1.1.0", "bad-path"),
        ("wéb\u200b", "1.1.0", "bad-path"), ("we\nb", "1.1.0", "bad-path"), ("w\udc80b", "1.1.0", "bad-path"),
        ("x" * 178, "1.1.0", "bad-path"), ("é" * 89, "1.1.0", "bad-path"), ("x" * 5000, "1.1.0", "bad-path"),
        ("https://h/web", "1.1.0", "bad-path"), ("web", "01.1.0", "bad-version"),
        ("web", "1.1.0-RC1", "bad-version"), ("web", "", "bad-version"),
    ],
    ids=lambda said: ascii(said[:12]),
)  # fmt: skip
def test_a_name_that_cannot_be_ordered_is_refused_before_the_images_are_read(
    tmp_path: Path, name: str, version: str, code: str
) -> None:
    read: list[int] = []
    with pytest.raises(InputError) as caught:
        attempt(tmp_path, About(name, version, ("b",), "x86_64"), read)
    assert (caught.value.code, read) == (code, [])
    assert len(caught.value.text) < 400
    left_alone(tmp_path)


@pytest.mark.parametrize(
    ("compatible", "least", "deny", "code"),
    [
        ((), "", (), "bad-bundle"),
        (("",), "", (), "bad-bundle"),
        (("b",), "", ("",), "bad-bundle"),
        (("b",), "next", (), "bad-version"),
    ],
)
def test_what_else_is_said_of_it_is_checked_first_too(
    tmp_path: Path, compatible: tuple[str, ...], least: str, deny: tuple[str, ...], code: str
) -> None:
    read: list[int] = []
    with pytest.raises(InputError) as caught:
        attempt(tmp_path, About("web", "1.1.0", compatible, "x86_64", least, deny), read)
    assert (caught.value.code, read) == (code, [])
    left_alone(tmp_path)


@pytest.mark.parametrize("name", ["web", "my-web_2.x", "wéb", "x" * 177], ids=ascii)
def test_what_is_built_can_be_ordered_by_its_name(tmp_path: Path, name: str) -> None:
    built = attempt(tmp_path, About(name, "1.1.0", ("b",), "x86_64"))
    for form in (built.path, f"{name}-1.1.0"):
        assert systems.asked(form).target == built.path
    assert describe(tmp_path / "out.bundle") == built


def test_the_longest_name_is_published_and_ordered(tmp_path: Path) -> None:
    with running(tmp_path) as world:
        node, made = new_node(world), publish(world, "1.1.0", name="x" * 177)
        assert made.path == f"os/{'x' * 177}-1.1.0.bundle"
        order(world, node, bundle=made.path)
        assert wanted(node)["lines"]["os"]["target"] == made.path


def test_a_manifest_that_a_node_would_refuse_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a manifest of 16777216 bytes at most") as caught:
        attempt(tmp_path, About("web", "1.1.0", ("b" * (16 << 20),), "x86_64"))
    assert caught.value.code == "bad-bundle"
    left_alone(tmp_path)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """The last step: a folder is not replaced by a file."""
    root, kernel, out = tmp_path / "root", tmp_path / "kernel", tmp_path / "out.bundle"
    root.write_bytes(bytes(range(256)) * 400)
    kernel.write_bytes(KERNEL)
    out.mkdir()
    with pytest.raises(MachineError) as caught:
        build(About("web", "1.1.0", ("b",), "x86_64"), root, kernel, out)
    assert caught.value.code == "disk-failed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel", "out.bundle", "root"]
