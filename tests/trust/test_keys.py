"""Keys at rest, signatures made elsewhere, and the offline command line."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from securesystemslib.signer import CryptoSigner
from typer.testing import CliRunner

from instar.core.errors import InputError, TrustError
from instar.trust.embedded import fingerprint
from instar_server.ctl import keys as keys_command
from instar_server.ctl import release as release_command
from instar_server.trust import keys, offline
from instar_server.trust.offline import RoleKeys
from instar_server.trust.repository import Repository
from tests.trust.world import World, days, now, program, signer

PASSPHRASE = b"correct horse"


def ask(name: str) -> bytes:
    return PASSPHRASE


# ---- keys at rest


def test_key_files_are_private_and_encrypted(tmp_path: Path) -> None:
    public = keys.generate(tmp_path, "root-1", PASSPHRASE)
    paths = keys.key_paths(tmp_path, "root-1")
    assert stat.S_IMODE(paths.private.stat().st_mode) == 0o600
    assert paths.private.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert keys.load_public(paths.public) == public
    assert keys.load(paths.private, ask).public_key == public


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
def test_openssl_opens_the_same_file_and_sees_scrypt(tmp_path: Path) -> None:
    public = keys.generate(tmp_path, "root-1", PASSPHRASE)
    path = str(keys.key_paths(tmp_path, "root-1").private)
    command = [
        "openssl",
        "pkey",
        "-in",
        path,
        "-passin",
        f"pass:{PASSPHRASE.decode()}",
        "-pubout",
        "-outform",
        "DER",
    ]
    der = subprocess.run(command, capture_output=True, check=True, timeout=20).stdout
    assert der[-32:].hex() == public.keyval["public"]
    parsed = subprocess.run(
        ["openssl", "asn1parse", "-in", path], capture_output=True, check=True, timeout=20
    )
    assert b":scrypt" in parsed.stdout
    assert b":aes-256-cbc" in parsed.stdout


def code_of(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert PASSPHRASE.decode() not in caught.value.text
    return caught.value.code


def test_key_files_that_cannot_be_used(tmp_path: Path) -> None:
    keys.generate(tmp_path, "k", PASSPHRASE)
    path = keys.key_paths(tmp_path, "k").private
    assert code_of(lambda: keys.load(path, lambda name: b"wrong horse")) == "wrong-passphrase"
    assert code_of(lambda: keys.load(path, None)) == "passphrase-needed"
    assert code_of(lambda: keys.generate(tmp_path, "k", PASSPHRASE)) == "key-exists"
    assert code_of(lambda: keys.generate(tmp_path, "l", b"short")) == "weak-passphrase"
    assert code_of(lambda: keys.generate(tmp_path, "../l", PASSPHRASE)) == "bad-name"
    assert code_of(lambda: keys.load(tmp_path / "none.key", ask)) == "no-key"
    path.chmod(0o644)
    assert code_of(lambda: keys.load(path, ask)) == "key-readable"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:80])
    assert code_of(lambda: keys.load(path, ask)) in ("wrong-passphrase", "bad-key")


def test_public_key_whose_id_is_not_its_own(tmp_path: Path) -> None:
    public = json.loads(keys.public_json(signer().public_key))
    public["keyid"] = signer().public_key.keyid
    assert code_of(lambda: keys.parse_public(json.dumps(public).encode(), "a key")) == "bad-key"


def test_where_passphrases_come_from(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_bytes(b"from the file\nsecond line\n")
    environment = {keys.ENVIRONMENT: "from the environment"}
    for source, expected in (
        (keys.passphrase_source(file, environment, ask), b"from the file"),
        (keys.passphrase_source(None, environment, ask), b"from the environment"),
        (keys.passphrase_source(None, {}, ask), PASSPHRASE),
    ):
        assert source is not None
        assert source("k") == expected
    assert keys.passphrase_source(None, {}, None) is None
    file.write_bytes(b"\n")
    assert code_of(lambda: keys.passphrase_source(file, {}, None)) == "no-passphrase"


def test_online_keys_plain_or_with_a_passphrase_file(tmp_path: Path) -> None:
    keys.generate_online(tmp_path / "plain")
    assert len(keys.load_online(tmp_path / "plain").snapshot) == 1
    keys.generate_online(tmp_path / "sealed", PASSPHRASE)
    assert code_of(lambda: keys.load_online(tmp_path / "sealed")) == "passphrase-needed"
    file = tmp_path / "passphrase"
    file.write_bytes(PASSPHRASE)
    keys.generate(tmp_path / "sealed", "timestamp-2", PASSPHRASE)
    assert len(keys.load_online(tmp_path / "sealed", file).timestamp) == 2
    assert code_of(lambda: keys.load_online(tmp_path)) == "no-key"


# ---- signing offline


def test_detached_signature_good_and_bad(world: World) -> None:
    """The key may live in another program: it sees the payload's bytes and gives back 64 bytes."""
    data = world.with_release(release_command.pack.pack_release(program("print(2)"), "1.2.0"))
    token = world.keys.targets[0]
    keyid = token.public_key.keyid
    signature = bytes.fromhex(token.sign(offline.payload(data)).signature)
    roots = [world.repository.root()]
    for wrong in (
        bytes(64),
        bytes([signature[0] ^ 1]) + signature[1:],
        bytes.fromhex(signer().sign(offline.payload(data)).signature),
    ):
        with pytest.raises(TrustError) as caught:
            offline.attach(data, keyid, wrong, roots)
        assert caught.value.code == "bad-signature"
        assert keyid[:8] in caught.value.text
        assert "targets version 3" in caught.value.text
    with pytest.raises(InputError) as error:
        offline.attach(data, signer().public_key.keyid, signature, roots)
    assert error.value.code == "not-a-key-of-role"
    data = offline.attach(data, keyid[:10], signature, roots)
    assert offline.state(data, roots[0]).missing == 1
    data = offline.sign(data, world.keys.targets[1], roots)
    assert world.repository.publish_targets(data, now()).targets == 3


def test_key_that_does_not_count_is_not_used(world: World) -> None:
    data = offline.first_targets(days(1))
    for key in (signer(), world.keys.root[0]):
        with pytest.raises(InputError) as caught:
            offline.sign(data, key, [world.root])
        assert caught.value.code == "not-a-key-of-role"


def test_release_never_changes_under_its_path(world: World) -> None:
    target = world.repository.targets()[0]
    with pytest.raises(InputError) as caught:
        offline.add_target(world.targets_bytes, target.path, 1, "0" * 64, {}, days(1))
    assert caught.value.code == "target-exists"
    again = offline.add_target(
        world.targets_bytes, target.path, target.length, target.sha256, target.custom, days(1)
    )
    assert offline.parse_signable(again).signed.version == 3
    assert not json.loads(offline.remove_target(again, target.path, days(1)))["signed"]["targets"]


def test_one_key_may_not_count_twice(world: World) -> None:
    key = signer()
    twin = keys.make_public(bytes.fromhex(key.public_key.keyval["public"]))
    twin.keyid = "f" * 64
    roles = {**world.keys.roles(), "targets": RoleKeys([key.public_key, twin], 2)}
    with pytest.raises(InputError) as caught:
        offline.first_root(roles, days(1))
    assert caught.value.code == "same-key-twice"
    roles["targets"] = RoleKeys([key.public_key], 2)
    with pytest.raises(InputError) as caught:
        offline.first_root(roles, days(1))
    assert caught.value.code == "threshold-too-high"


# ---- the command line

APP = typer.Typer()
APP.add_typer(keys_command.app, name="keys")
APP.add_typer(release_command.app, name="release")


def run(*arguments: object, status: int = 0) -> dict[str, Any]:
    words = [str(word) for word in arguments]
    result = CliRunner().invoke(APP, [*words, "--json"], env={"INSTAR_PASSPHRASE": PASSPHRASE.decode()})
    assert result.exit_code == status, result.output
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def test_from_the_ceremony_to_a_published_release(tmp_path: Path) -> None:
    """The whole walk by commands, with one signature made outside, and a root rotated at the end."""
    fleet, out = tmp_path / "fleet", tmp_path / "out"
    out.mkdir()
    made = run("keys", "ceremony", "--out", fleet)
    assert made["root"]["roles"]["targets"]["threshold"] == 2
    assert run("keys", "ceremony", "--out", fleet, status=2)["error"]["code"] == "folder-not-empty"
    pyz = tmp_path / "instar.pyz"
    pyz.write_bytes(program())
    assert run("release", "pack", pyz, "--out", out, status=2)["error"]["code"] == "no-version"
    packed = run("release", "pack", pyz, "--out", out, "--version", "1.1.0")
    archive, targets, root = Path(packed["archive"]), out / "targets.json", fleet / "root.json"
    assert (
        run("release", "add", archive, "--targets", fleet / "targets.json", "--out", targets)["version"] == 2
    )

    assert (
        run("release", "sign", targets, "--key", fleet / "targets/targets-1.key", "--root", root)["missing"]
        == 1
    )
    wrong = run("release", "sign", targets, "--key", fleet / "root/root-1.key", "--root", root, status=2)
    assert wrong["error"]["code"] == "not-a-key-of-role"
    token = keys.load(fleet / "targets" / "targets-3.key", ask)
    run("release", "payload", targets, "--out", out / "bytes")
    signature = out / "signature"
    signature.write_text(
        base64.b64encode(bytes.fromhex(sign_elsewhere(token, out / "bytes"))).decode() + "\n"
    )
    attach = ("release", "attach", targets, "--signature", signature, "--root", root, "--keyid")
    assert (
        run(*attach, made["root"]["roles"]["targets"]["keyids"][0], status=3)["error"]["code"]
        == "bad-signature"
    )
    assert run(*attach, token.public_key.keyid)["missing"] == 0
    run("release", "verify", targets, "--root", root)

    repository = Repository.create(
        tmp_path / "repository", root.read_bytes(), keys.load_online(fleet / "online"), now()
    )
    repository.publish_targets((fleet / "targets.json").read_bytes(), now())
    published = release_command.upload(Local(repository), targets.read_bytes(), [archive], quiet=True)
    assert (published["targets"], published["timestamp"]) == (2, 2)

    run("keys", "generate", "root-4", "--out", fleet / "root")
    old, new = made["root"]["roles"]["root"]["keyids"][2][:9], fleet / "root" / "root-4.pub.json"
    signing = [word for number in (1, 2) for word in ("--key", fleet / "root" / f"root-{number}.key")]
    rotated = run(
        "keys", "rotate", "--root", root, "--old", old, "--new", new, "--out", out / "2.root.json", *signing
    )
    assert rotated["missing"] == [0, 0]
    local = Local(repository)
    assert release_command.upload(local, (out / "2.root.json").read_bytes(), [], quiet=True)["root"] == 2
    assert run("keys", "show", out / "2.root.json", new)["files"][0]["version"] == 2
    shown = run("keys", "show", root)["files"][0]["fingerprint"]
    assert shown == fingerprint(json.loads(root.read_bytes())), "what `instar install --pin` takes"
    repository.close()


def sign_elsewhere(token: CryptoSigner, file: Path) -> str:
    return token.sign(file.read_bytes()).signature


class Local:
    """The server's answers to `release publish`, from a repository in this process."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def upload(self, path: str, file: Path, progress: Any = None) -> dict[str, Any]:
        temporary = self._repository.blobs.staging / "part"
        shutil.copy(file, temporary)
        progress(file.stat().st_size, file.stat().st_size)
        return {"sha256": self._repository.blobs.add(temporary, path.removeprefix("/blobs/")).sha256}

    def put_bytes(self, path: str, data: bytes, content_type: str = "application/json") -> dict[str, Any]:
        publish = {
            "/trust/targets": self._repository.publish_targets,
            "/trust/root": self._repository.publish_root,
        }[path]
        published = publish(data, now())
        return {role: getattr(published, role) for role in ("root", "targets", "snapshot", "timestamp")}


def test_unfinished_document_does_not_verify(tmp_path: Path) -> None:
    run("keys", "ceremony", "--out", tmp_path / "fleet", "--holders", 2, "--threshold", 2)
    document = tmp_path / "t.json"
    document.write_bytes(offline.first_targets(days(1)))
    assert run("release", "verify", document, "--root", tmp_path / "fleet" / "root.json", status=3)[
        "error"
    ] == {
        "code": "wrong-threshold",
        "text": "cannot accept targets version 1: expected 2 signatures by keys that "
        f"{tmp_path / 'fleet' / 'root.json'} lists for targets, got 0 good and 0 bad",
    }


def test_every_command_explains_itself() -> None:
    for command in (["keys"], ["keys", "ceremony"], ["keys", "rotate"], ["release"], ["release", "payload"]):
        result = CliRunner().invoke(APP, [*command, "--help"])
        assert result.exit_code == 0
        assert len(result.stdout) > 300
