"""targets.unpack: archives that attack, and the good one."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from instar.core.errors import InstarError, TrustError
from instar.core.releases import Release
from instar.host.files import DISK
from instar.targets.unpack import LARGE, unpack
from instar.trust.program import join_program, program_digest
from tests.node.world import UNSYNCED, Built, Node, build, manifest, member, program, tar_gz

NEW = build("1.1.0")
PROGRAM = NEW.files["instar.pyz"]
DIGEST = NEW.release.digest


def with_files(files: dict[str, bytes], *extra: tuple[tarfile.TarInfo, bytes], **changes: object) -> bytes:
    said = manifest(files, "1.1.0", DIGEST, **changes)
    return tar_gz([member("manifest.json", said), *(member(p, b) for p, b in files.items()), *extra])


def with_listed(entry: dict[str, object]) -> bytes:
    said = json.dumps({**json.loads(manifest({}, "1.1.0", DIGEST)), "files": [entry]}).encode()
    return tar_gz([member("manifest.json", said), member("instar.pyz", PROGRAM)])


def listed(path: str, *, size: int = 1, sha256: str = "0" * 64, mode: str = "0644") -> dict[str, object]:
    return {"path": path, "size": size, "sha256": sha256, "mode": mode}


def good() -> dict[str, bytes]:
    return dict(NEW.files)


def with_member(*extra: tuple[tarfile.TarInfo, bytes]) -> bytes:
    return with_files(good(), *extra)


def instead_of_notes(kind: bytes, link: str = "") -> bytes:
    files = good()
    said = manifest(files, "1.1.0", DIGEST)
    return tar_gz([
        member("manifest.json", said), member("instar.pyz", PROGRAM), member("doc/notes.txt", b"", kind, link),
    ])  # fmt: skip


def changed(name: str, data: bytes) -> bytes:
    said = manifest(good(), "1.1.0", DIGEST)
    files = {**good(), name: data}
    return tar_gz([member("manifest.json", said), *(member(p, b) for p, b in files.items())])


ATTACKS: dict[str, Callable[[], bytes]] = {
    "path out by dots": lambda: with_member(member("../evil", b"x")),
    "path out deeper": lambda: with_member(member("doc/../../evil", b"x")),
    "absolute path": lambda: with_member(member("/tmp/evil", b"x")),
    "listed path out": lambda: with_files({**good(), "../evil": b"x"}),
    "listed absolute path": lambda: with_files({**good(), "/tmp/evil": b"x"}),
    "symbolic link": lambda: instead_of_notes(tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": lambda: instead_of_notes(tarfile.LNKTYPE, "instar.pyz"),
    "character device": lambda: instead_of_notes(tarfile.CHRTYPE),
    "block device": lambda: instead_of_notes(tarfile.BLKTYPE),
    "pipe": lambda: instead_of_notes(tarfile.FIFOTYPE),
    "folder": lambda: instead_of_notes(tarfile.DIRTYPE),
    "contiguous file": lambda: instead_of_notes(tarfile.CONTTYPE),
    "link to a folder, then a file through it": lambda: with_member(
        member("lib", b"", tarfile.SYMTYPE, "/tmp"), member("lib/evil", b"x")
    ),
    "extra file": lambda: with_member(member("extra", b"x")),
    "the marker itself": lambda: with_member(member("valid", b"x")),
    "a file twice": lambda: with_member(member("instar.pyz", PROGRAM)),
    "missing file": lambda: tar_gz([
        member("manifest.json", manifest(good(), "1.1.0", DIGEST)), member("instar.pyz", PROGRAM)
    ]),
    "wrong size": lambda: changed("doc/notes.txt", b"longer than it was, and by far"),
    "wrong bytes": lambda: changed("doc/notes.txt", b"NOTES of 1.1.0"),
    "another program": lambda: with_files({**good(), "instar.pyz": program("evil", "1.1.0")}),
    "no program": lambda: with_files({"doc/notes.txt": b"x"}),
    "manifest of another version": lambda: tar_gz([
        member("manifest.json", manifest(good(), "1.2.0", DIGEST)), *(member(p, b) for p, b in good().items())
    ]),
    "manifest of another digest": lambda: with_files(good(), program_digest="0" * 96),
    "manifest of a newer format": lambda: with_files(good(), format=2),
    "manifest that is no JSON": lambda: tar_gz([member("manifest.json", b"{")]),
    "manifest that nests deeply": lambda: tar_gz([member("manifest.json", b"[" * 100_000)]),
    "manifest not first": lambda: tar_gz([
        member("instar.pyz", PROGRAM), member("manifest.json", manifest(good(), "1.1.0", DIGEST))
    ]),
    "manifest with a setuid mode": lambda: with_listed(listed("instar.pyz", mode="4755")),
    "huge promise": lambda: with_listed(listed("instar.pyz", size=1 << 50)),
    "no files": lambda: tar_gz([]),
    "no gzip": lambda: b"plain bytes",
    "nothing": lambda: b"",
    "no tar": lambda: gzip.compress(os.urandom(2000)),
    "truncated": lambda: NEW.archive[: len(NEW.archive) // 2],
    "altered in the middle": lambda: NEW.archive[:200] + bytes([NEW.archive[200] ^ 255]) + NEW.archive[201:],
}  # fmt: skip


def refused(node: Node, archive: bytes, built: Built = NEW) -> InstarError:
    path = node.layout.staging / "archive"
    path.write_bytes(archive)
    before = sorted(os.listdir(node.layout.state))
    with pytest.raises(TrustError) as caught:
        unpack(path, node.line, built.release, DISK)
    assert not node.line.is_valid(built.name)
    assert not (node.line.folder(built.name) / "valid").exists()
    assert sorted(os.listdir(node.layout.state)) == before
    assert not (node.line.layout.releases / "evil").exists()
    assert not Path("/tmp/evil").exists()
    assert node.line.is_valid(node.line.current())
    return caught.value


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_an_attack_is_refused_and_leaves_nothing_valid(node: Node, attack: str) -> None:
    refused(node, ATTACKS[attack]())


def test_an_archive_cut_anywhere_is_refused_unless_all_files_are_there(node: Node) -> None:
    path = node.layout.staging / "archive"
    for cut in range(0, len(NEW.archive), 7):
        path.write_bytes(NEW.archive[:cut])
        try:
            unpack(path, node.line, NEW.release, UNSYNCED)
        except TrustError:
            assert not node.line.is_valid(NEW.name)
        else:  # only padding was cut off
            node.line.check(NEW.name)
            assert cut > len(NEW.archive) - 40
            node.line.remove_release(NEW.name)


def test_a_bomb_is_not_blown_up(node: Node) -> None:
    """Zeros by the gigabyte behind a small listed file: refused at its header, without reading them."""
    info = tarfile.TarInfo("doc/notes.txt")
    info.size = 4 << 30
    said = manifest(good(), "1.1.0", DIGEST)
    head = tar_gz([member("manifest.json", said), member("instar.pyz", PROGRAM)])
    plain = gzip.decompress(head).rstrip(b"\0")
    plain += b"\0" * (-len(plain) % 512) + info.tobuf() + bytes(1 << 20)
    error = refused(node, gzip.compress(plain))
    assert "expected 14 bytes, got 4294967296" in error.text


def test_a_manifest_bomb_is_not_read(node: Node) -> None:
    info, _ = member("manifest.json")
    info.size = 1 << 32
    refused(node, gzip.compress(info.tobuf() + bytes(1 << 16)))


def test_an_extended_header_bomb_is_bounded(node: Node) -> None:
    info, _ = member("x", b"", tarfile.XHDTYPE)
    info.size = 64 << 20
    refused(node, gzip.compress(info.tobuf() + bytes(64 << 20), compresslevel=1))


def test_a_good_archive_becomes_a_valid_release_that_nobody_may_write(node: Node) -> None:
    path = node.layout.staging / "archive"
    path.write_bytes(NEW.archive)
    unpack(path, node.line, NEW.release, DISK)
    node.line.check(NEW.name)
    folder = node.line.folder(NEW.name)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "doc/notes.txt", "instar.pyz", "manifest.json", "valid",
    ]  # fmt: skip
    assert all(p.stat().st_mode & 0o222 == 0 for p in folder.rglob("*") if p.is_file())
    path.unlink()
    unpack(path, node.line, NEW.release, DISK)  # valid already: the archive is not even opened


def test_the_rest_of_a_killed_unpack_is_no_hindrance(node: Node) -> None:
    folder = node.line.folder(NEW.name)
    (folder / "doc").mkdir(parents=True)
    (folder / "doc" / "rest").write_bytes(b"x")
    (folder / "instar.pyz").symlink_to("/etc/passwd")
    (folder / "valid").write_bytes(b"0" * 64)
    path = node.layout.staging / "archive"
    path.write_bytes(NEW.archive)
    unpack(path, node.line, NEW.release, DISK)
    node.line.check(NEW.name)
    assert not (folder / "doc" / "rest").exists()


def large(comment: bytes) -> bytes:
    """A program of more bytes than are held at once."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("__main__.py", b"pass")
        archive.writestr("filler", os.urandom(LARGE + 3_000_000))
    return join_program(file.getvalue(), comment)


@pytest.mark.parametrize("comment", [b"", b"YQ==.Yg==" * 5000])
def test_a_large_program_is_unpacked_piece_by_piece(node: Node, tmp_path: Path, comment: bytes) -> None:
    data = large(comment)
    release = Release("2.0.0", program_digest(data))
    archive, files = tmp_path / "large.tar.gz", {"instar.pyz": data}
    said = manifest(files, "2.0.0", release.digest)
    archive.write_bytes(tar_gz([member("manifest.json", said), member("instar.pyz", data)]))
    unpack(archive, node.line, release, DISK)
    path = node.line.program(release.name)
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o222 == 0
    assert node.line.is_valid(release.name)


def test_a_large_file_that_is_not_the_listed_one_is_refused(node: Node, tmp_path: Path) -> None:
    data = large(b"")
    other = data[:-100_000] + bytes(99_900) + data[-100:]
    release = Release("2.0.0", program_digest(data))
    archive = tmp_path / "large.tar.gz"
    said = manifest({"instar.pyz": data}, "2.0.0", release.digest)
    archive.write_bytes(tar_gz([member("manifest.json", said), member("instar.pyz", other)]))
    with pytest.raises(TrustError) as refused:
        unpack(archive, node.line, release, DISK)
    assert refused.value.code == "altered-file"
    assert not node.line.is_valid(release.name)
