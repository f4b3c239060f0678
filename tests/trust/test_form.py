"""Programs, comments, manifests and archives: what has a bad form is refused by its form."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import tarfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.formats import encode_canonical

from instar.core.errors import InputError, InstarError, TrustError
from instar.oneshot.identity import check_embedded
from instar.trust.archive import ArchiveRules
from instar.trust.embedded import EmbeddedConfig, canonical, format_comment, parse_comment, read_embedded
from instar.trust.manifest import FileEntry, Manifest
from instar.trust.paths import check_path
from instar.trust.program import join_program, program_digest, split_program
from instar_server.trust.pack import pack_release, release_of
from tests.trust.world import CA, World, program, sha256, signer

PROGRAM = program()
EVIL = program("print('evil')")


def embed(world: World, **changes: str) -> bytes:
    fields = {"server": "https://update.example:8443", "ca": CA, "token": "t-1", "group": "default"}
    return world.repository.embed(PROGRAM, **{**fields, **changes})


def raw_comment(data: bytes, comment: bytes) -> bytes:
    """A comment put in without any check, as an attacker would."""
    return split_program(data)[0][:-2] + struct.pack("<H", len(comment)) + comment


# ---- the program's digest (requirements M1, M2)


def test_configuration_does_not_change_the_digest(world: World) -> None:
    one, two = embed(world), embed(world, server="https://other.example:9443", token="t-2")
    assert one != two
    assert program_digest(one) == program_digest(two) == program_digest(PROGRAM)
    assert split_program(one)[0] == PROGRAM


def test_any_other_byte_changes_the_digest() -> None:
    end = len(PROGRAM) - 22
    for place in (0, 30, end // 2, end - 1):
        altered = bytearray(PROGRAM)
        altered[place] ^= 1
        assert program_digest(bytes(altered)) != program_digest(PROGRAM)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x05\x06",
        b"no zip at all",
        PROGRAM[:-1],
        PROGRAM + b"x",
        raw_comment(PROGRAM, EVIL),
        raw_comment(PROGRAM, b"A" * 30 + b"PK\x05\x06" + b"A" * 30),
        raw_comment(PROGRAM, b"PK\x05\x06" + b"\0" * 18),
        PROGRAM[:-6] + struct.pack("<I", 0x7FFFFFFF) + PROGRAM[-2:],
    ],
)
def test_what_is_no_program_is_refused(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        program_digest(data)
    assert caught.value.code == "bad-program"


def test_comment_with_a_whole_program_in_it_is_refused_both_ways() -> None:
    forged = raw_comment(PROGRAM, EVIL)
    with pytest.raises(InputError, match="another zip file's record"):
        split_program(forged)
    with pytest.raises(InputError, match="'PK'"):
        join_program(PROGRAM, EVIL)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_give_a_digest_or_a_clear_error(tail: bytes) -> None:
    for data in (tail, PROGRAM + tail, PROGRAM[: len(PROGRAM) - 30] + tail):
        try:
            digest = program_digest(data)
        except InputError:
            continue
        assert len(digest) == 96


# ---- the embedded configuration


def test_embedded_configuration_is_read_and_signed(world: World) -> None:
    config = check_embedded(embed(world))
    assert (config.server, config.token, config.group) == ("https://update.example:8443", "t-1", "default")
    assert config.root == json.loads(world.root)
    assert check_embedded(embed(world), pin=config.fingerprint.upper()) == config


def test_fingerprint_is_that_of_canonical_json(world: World) -> None:
    expected = sha256(str(encode_canonical(json.loads(world.root))).encode())
    assert read_embedded(embed(world))[0].fingerprint == expected


def test_chance_letters_pk_are_spelled_away(world: World) -> None:
    """'O+', which a certificate in PEM may well hold, becomes 'PK' when it stands in a certain place."""
    held = 0
    for number in range(60):
        token = "t" * number + "O+"
        config = EmbeddedConfig(1, "https://h:1", CA + "O+" * 9, json.loads(world.root), token, "g")
        held += b"PK" in base64.b64encode(config.encode())
        comment = format_comment(config.encode(), world.repository.sign_config)
        assert b"PK" not in comment
        assert check_embedded(join_program(PROGRAM, comment)) == config
    assert held > 20, "the test shows nothing if chance never makes 'PK'"


@pytest.mark.parametrize(
    ("comment", "code"),
    [
        (b"", "no-configuration"),
        (b"e30=", "bad-comment"),
        (b"e30=.e30=.e30=", "bad-comment"),
        (b"e30=\n.e30=", "bad-comment"),
        (b"e30=.e3\x000=", "bad-comment"),
        (b"PKAA.e30=", "bad-comment"),
        (b"e30=.e30=", "bad-comment"),
        (b"e3=0.e30=", "bad-comment"),
    ],
)
def test_comments_of_bad_form(comment: bytes, code: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_comment(comment)
    assert caught.value.code == code


def respelled(world: World, **changes: Any) -> bytes:
    """A comment whose JSON was changed after signing, with the signature that was there."""
    _, data, signature = read_embedded(embed(world))
    value = {**json.loads(data), **changes}
    text = base64.b64encode(json.dumps(value).encode())
    return raw_comment(PROGRAM, text + b"." + base64.b64encode(signature))


def test_changed_server_address(world: World) -> None:
    forged = respelled(world, server="https://evil.example:8443", ca=CA)
    while b"PK" in split_program(forged)[1]:
        forged = respelled(world, server="https://evil.example:8443", ca=CA, x="a" * len(forged))
    with pytest.raises(TrustError) as caught:
        check_embedded(forged)
    assert caught.value.code == "config-signature"
    assert world.keys.timestamp.public_key.keyid[:8] in caught.value.text


def test_signature_by_another_key_and_a_root_of_a_stranger(world: World) -> None:
    config = read_embedded(embed(world))[0]
    stranger = signer()
    comment = format_comment(config.encode(), lambda data: bytes.fromhex(stranger.sign(data).signature))
    with pytest.raises(TrustError) as caught:
        check_embedded(join_program(PROGRAM, comment))
    assert caught.value.code == "config-signature"
    broken = json.loads(world.root)
    broken["signatures"] = broken["signatures"][:1]
    config = EmbeddedConfig(1, config.server, CA, broken, "t", "g")
    comment = format_comment(config.encode(), world.repository.sign_config)
    with pytest.raises(TrustError) as caught:
        check_embedded(join_program(PROGRAM, comment))
    assert caught.value.code == "bad-embedded-root"


def test_wrong_pin_names_both(world: World) -> None:
    data = embed(world)
    with pytest.raises(TrustError) as caught:
        check_embedded(data, pin="ab" * 32)
    assert caught.value.code == "wrong-pin"
    assert "ab" * 32 in caught.value.text
    assert read_embedded(data)[0].fingerprint in caught.value.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v": 2}, "'v' to be 1, got 2"),
        ({"v": True}, "'v' to be int, got bool"),
        ({"server": None}, "'server' to be str, got null"),
        ({"server": "http://h:1"}, "https://host:port"),
        ({"server": "https://h"}, "https://host:port"),
        ({"server": "https://h:1/path"}, "https://host:port"),
        ({"server": "https://u@h:1"}, "https://host:port"),
        ({"server": "https://h:99999"}, "https://host:port"),
        ({"ca": "none"}, "'ca' to be a certificate"),
        ({"root": []}, "'root' to be dict, got list"),
        ({"token": ""}, "'token' is empty"),
        ({"group": 1}, "'group' to be str, got int"),
    ],
)
def test_configuration_fields(world: World, change: dict[str, Any], words: str) -> None:
    value = {**json.loads(read_embedded(embed(world))[1]), "unknown": 1}
    assert EmbeddedConfig.decode(json.dumps(value).encode()).group == "default"
    with pytest.raises(InputError) as caught:
        EmbeddedConfig.decode(json.dumps({**value, **change}).encode())
    assert words in caught.value.text
    for name in change:
        short = {key: item for key, item in value.items() if key != name}
        with pytest.raises(InputError, match=f"'{name}' is missing"):
            EmbeddedConfig.decode(json.dumps(short).encode())


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b"null", b"\xff", b'{"v":1,"v":1}', b'{"v":NaN}', b"[" * 100_000]
)
def test_configuration_that_is_no_object(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        EmbeddedConfig.decode(data)
    assert caught.value.code == "bad-configuration"


def test_too_large_a_configuration(world: World) -> None:
    with pytest.raises(InputError) as caught:
        embed(world, ca=CA + "x" * 60_000)
    assert caught.value.code == "comment-too-large"
    assert "at most 65535 bytes" in caught.value.text


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
def test_canonical_json_is_that_of_tuf(value: object) -> None:
    assert canonical(value) == str(encode_canonical(value)).encode("utf-8", "surrogatepass")  # type: ignore[arg-type]


# ---- manifests and archives (requirement D3)

RELEASE = pack_release(PROGRAM, "1.1.0")
ENTRY = {"path": "instar.pyz", "size": 3, "sha256": "0" * 64, "mode": "0755"}
MANIFEST = {"format": 1, "name": "instar", "version": "1.0.0", "program_digest": "0" * 96, "files": [ENTRY]}
BAD_PATHS = [
    "/etc/passwd",
    "../x",
    "a/../../x",
    "..",
    ".",
    "",
    "a//b",
    "a/",
    "a/./b",
    "..\\x",
    "c:x",
    "a\0b",
    "a\nb",
    "x" * 600,
    "\udc80",
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_that_lead_out(path: str) -> None:
    with pytest.raises(InputError) as caught:
        check_path(path, "test")
    assert caught.value.code == "bad-path"
    with pytest.raises(InputError):
        Manifest.decode(json.dumps({**MANIFEST, "files": [{**ENTRY, "path": path}]}).encode())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "'format' to be 1"),
        ({"version": "../1"}, "'version'"),
        ({"program_digest": "0" * 95}, "96 hexadecimal digits"),
        ({"files": []}, "1 to 4096 files, got 0"),
        ({"files": [ENTRY, ENTRY]}, "'instar.pyz' is listed twice"),
        ({"files": [{**ENTRY, "size": -1}]}, "'size' to be 0 or more"),
        ({"files": [{**ENTRY, "size": True}]}, "'size' to be int, got bool"),
        ({"files": [{**ENTRY, "mode": "4755"}]}, "'mode' to be one of"),
        ({"files": [{**ENTRY, "sha256": "G" * 64}]}, "64 hexadecimal digits"),
        ({"files": [{**ENTRY, "path": "manifest.json"}]}, "lists itself"),
        (
            {"files": [{**ENTRY, "path": "a"}, {**ENTRY, "path": "a/b"}]},
            "is a file and the folder of 'a/b'",
        ),
        ({"files": ["x"]}, "file 0 of the manifest: expected an object"),
    ],
)
def test_bad_manifests(change: dict[str, Any], words: str) -> None:
    Manifest.decode(json.dumps({**MANIFEST, "unknown": 1}).encode())
    with pytest.raises(InputError) as caught:
        Manifest.decode(json.dumps({**MANIFEST, **change}).encode())
    assert words in caught.value.text


def test_manifest_that_is_not_the_signed_one() -> None:
    manifest = Manifest.decode(json.dumps(MANIFEST).encode())
    manifest.check_target("1.0.0", "0" * 96)
    with pytest.raises(TrustError) as caught:
        manifest.check_target("1.0.1", "0" * 96)
    assert (caught.value.code, "expected version 1.0.1, got 1.0.0" in caught.value.text) == (
        "altered-manifest",
        True,
    )
    with pytest.raises(TrustError, match="program_digest"):
        manifest.check_target("1.0.0", "1" * 96)


def test_file_that_is_not_the_listed_one() -> None:
    entry = FileEntry("instar.pyz", 3, sha256(b"abc"), "0755")
    entry.check(3, sha256(b"abc"))
    for size, digest, words in (
        (4, sha256(b"abc"), "expected 3 bytes, got 4"),
        (3, sha256(b"abd"), "expected sha256"),
    ):
        with pytest.raises(TrustError, match=words):
            entry.check(size, digest)


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def walk(archive: bytes) -> list[str]:
    """What an extractor does, without the disk."""
    rules, names = ArchiveRules(), []
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:*") as tar:
        for info in tar:
            entry = rules.admit(info)
            file = tar.extractfile(info)
            assert file is not None
            data = file.read()
            if entry is None:
                rules.manifest_read(Manifest.decode(data))
            else:
                entry.check(len(data), sha256(data))
                names.append(entry.path)
    rules.finish()
    return names


def archive_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


LISTED = json.dumps({**MANIFEST, "files": [{**ENTRY, "sha256": sha256(b"abc")}]}).encode()
GOOD = (member("manifest.json", LISTED), member("instar.pyz", b"abc"))


def test_good_archives_pass() -> None:
    assert walk(archive_of(*GOOD)) == ["instar.pyz"]
    assert walk(RELEASE.archive) == ["instar.pyz"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ((), "no manifest.json"),
        (GOOD[1:], "expected manifest.json first"),
        (GOOD[:1], "the manifest lists it, but it is not there"),
        ((*GOOD, GOOD[1]), "stands there twice"),
        ((*GOOD, member("extra", b"x")), "does not list it"),
        ((GOOD[0], member("instar.pyz", b"abcd")), "expected 3 bytes, got 4"),
        ((GOOD[0], member("instar.pyz", b"abd")), "expected sha256"),
        ((*GOOD, member("../x", b"x")), "leads out"),
        ((*GOOD, member("/x", b"x")), "absolute"),
        (
            (GOOD[0], member("instar.pyz", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
            "got a symbolic link",
        ),
        ((GOOD[0], member("instar.pyz", type=tarfile.LNKTYPE, linkname="manifest.json")), "got a hard link"),
        ((GOOD[0], member("instar.pyz", type=tarfile.CHRTYPE)), "got a character device"),
        ((GOOD[0], member("instar.pyz", type=tarfile.BLKTYPE)), "got a block device"),
        ((GOOD[0], member("instar.pyz", type=tarfile.FIFOTYPE)), "got a pipe"),
        ((GOOD[0], member("lib", type=tarfile.DIRTYPE), GOOD[1]), "got a folder"),
        ((member("manifest.json", type=tarfile.SYMTYPE, linkname="x"), GOOD[1]), "got a symbolic link"),
    ],
)
def test_bad_archives(members: tuple[tuple[tarfile.TarInfo, bytes], ...], words: str) -> None:
    with pytest.raises(TrustError) as caught:
        walk(archive_of(*members))
    assert words in caught.value.text


def test_archive_that_promises_too_much() -> None:
    manifest = Manifest.decode(json.dumps({**MANIFEST, "files": [{**ENTRY, "size": 2**40}]}).encode())
    with pytest.raises(TrustError) as caught:
        ArchiveRules().manifest_read(manifest)
    assert caught.value.code == "bad-archive"


# ---- releases


def test_the_same_program_gives_the_same_archive(world: World) -> None:
    again = pack_release(embed(world), "1.1.0")
    assert again == RELEASE, "the embedded configuration is left out, and nothing else varies"
    assert RELEASE.path == "node/instar-1.1.0.tar.gz"
    assert RELEASE.custom["program_digest"] == program_digest(PROGRAM)
    assert release_of(RELEASE.archive) == RELEASE


def test_release_archives_that_are_no_releases() -> None:
    altered = archive_of(GOOD[0], member("instar.pyz", PROGRAM))
    for data, code in ((b"junk", "bad-release"), (gzip.compress(altered, mtime=0), "bad-release")):
        with pytest.raises(InstarError) as caught:
            release_of(data)
        assert caught.value.code == code
    with pytest.raises(InputError):
        pack_release(b"no program", "1.0")
    with pytest.raises(InputError):
        pack_release(PROGRAM, "1.0/../../x")
