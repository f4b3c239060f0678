"""The one-shot children as they really run: from a zipapp, under -I -S, without any wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import securesystemslib
import tuf
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import instar
from instar.core.errors import InputError, MachineError
from instar.oneshot import keygen
from instar.oneshot.identity import make_key_and_csr
from instar.trust.program import program_digest
from tests.trust.world import CA, PATH, World

# What a node's __main__ does, with metadata from a folder instead of a server.
MAIN = """
import json, sys
from pathlib import Path

def served_from(folder):
    def fetch(path):
        from instar.core.errors import ServerRefused
        file = Path(folder, path)
        if not file.is_file():
            raise ServerRefused("no-metadata", path)
        return file.read_bytes()
    return fetch

entry, arguments = sys.argv[1], sys.argv[2:]
if entry == "verify":
    from instar.oneshot import verify
    status = verify.main(arguments)
elif entry == "inspect":
    from instar.oneshot import identity
    status = identity.main(arguments)
elif entry == "lookup":
    from datetime import datetime, timezone
    from instar.oneshot import diet
    diet.apply()
    from instar.oneshot.metadata import verify_target
    found = verify_target(Path(arguments[0]), arguments[1], served_from(arguments[2]), datetime.now(timezone.utc))
    print(json.dumps({"versions": found.versions, "url_path": found.url_path}))
    status = 0
elif entry == "residents":
    import instar.trust.archive, instar.trust.embedded, instar.trust.manifest, instar.trust.program
    status = 0
loaded = sorted(name for name, module in sys.modules.items() if module is not None)
print(json.dumps(loaded), file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zipapp with the node's package and the two pure libraries, without the fetchers that need wheels."""
    path = tmp_path_factory.mktemp("program") / "instar.pyz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__main__.py", MAIN)
        for package in (instar, tuf, securesystemslib):
            folder = Path(next(iter(package.__path__)))
            for part in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
                if not (part / "__init__.py").exists():  # zipimport knows no namespace packages
                    archive.writestr(f"{part.relative_to(folder.parent)}/__init__.py", "")
            for file in sorted(folder.rglob("*.py")):
                if file.name not in ("urllib3_fetcher.py", "requests_fetcher.py"):
                    archive.write(file, str(file.relative_to(folder.parent)))
    return path


def run(pyz: Path, *arguments: object) -> tuple[int, dict[str, Any], set[str]]:
    command = [sys.executable, "-I", "-S", str(pyz), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]}
    )
    lines = done.stdout.splitlines()
    assert done.stderr, done
    loaded = done.stderr.splitlines()[-1]
    assert loaded.startswith("["), done.stderr
    return done.returncode, json.loads(lines[0]) if lines else {}, set(json.loads(loaded))


def serve(world: World) -> Path:
    folder = world.folder / "served"
    (folder / "metadata").mkdir(parents=True)
    for name, data in world.served().items():
        (folder / "metadata" / name).write_bytes(data)
    return folder


def test_verification_from_a_zipapp_carries_no_wheel(pyz: Path, world: World) -> None:
    status, answer, loaded = run(pyz, "lookup", world.trust, PATH, serve(world))
    assert status == 0
    assert answer["versions"] == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 2}
    for name in ("cryptography", "urllib3", "requests", "asyncio"):
        assert name not in loaded
        assert not [module for module in loaded if module.startswith(f"{name}.")]
    assert "securesystemslib._vendor.ed25519.ed25519" in loaded, "the vendored ed25519 did the work"


def test_vendored_ed25519_refuses_as_well(pyz: Path, world: World) -> None:
    folder = serve(world)
    timestamp = folder / "metadata" / "timestamp.json"
    value = json.loads(timestamp.read_bytes())
    value["signed"]["version"] = 7
    timestamp.write_text(json.dumps(value))
    command = [sys.executable, "-I", "-S", str(pyz), "lookup", str(world.trust), PATH, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "TrustError: cannot trust timestamp version 7: expected 1 signatures" in done.stderr


def test_residents_parts_of_trust_load_nothing_big(pyz: Path) -> None:
    _, _, loaded = run(pyz, "residents")
    for name in (
        "tuf",
        "securesystemslib",
        "cryptography",
        "ssl",
        "subprocess",
        "ctypes",
        "http",
        "asyncio",
    ):
        assert name not in loaded


def test_verify_says_in_json_what_it_cannot_do(pyz: Path, world: World) -> None:
    state = world.trust.parent
    status, answer, _ = run(pyz, "verify", "--state", state, "--target", PATH)
    assert (status, answer["ok"], answer["error"]["code"], answer["kind"]) == (2, False, "no-server", "input")
    identity = state / "identity"
    identity.mkdir()
    (identity / "node.json").write_text('{"v":1,"server":"https://127.0.0.1:1"}')
    status, answer, _ = run(pyz, "verify", "--state", state, "--target", PATH)
    assert (status, answer["error"]["code"], answer["kind"]) == (4, "bad-identity", "machine")
    status, answer, _ = run(pyz, "verify", "--state", state, "--target", "../x")
    assert (status, answer["error"]["code"], answer["kind"]) == (2, "bad-path", "input")


def test_inspect_checks_a_program_file(pyz: Path, world: World) -> None:
    bare = pyz.read_bytes()
    data = world.repository.embed(bare, server="https://h:1", ca=CA, token="secret-token", group="default")
    file = world.folder / "with.pyz"
    file.write_bytes(data)
    status, answer, loaded = run(file, "inspect", file, "--json")
    assert (status, answer["ok"], answer["digest"]) == (0, True, program_digest(bare))
    assert answer["config"] == {"server": "https://h:1", "group": "default", "root_version": 1}
    assert "secret-token" not in json.dumps(answer)
    assert "cryptography" not in loaded
    status, answer, _ = run(file, "inspect", file, "--json", "--pin", "0" * 64)
    assert (status, answer["error"]["code"]) == (3, "wrong-pin")
    status, answer, _ = run(file, "inspect", pyz, "--json")
    assert (status, answer["error"]["code"]) == (2, "no-configuration")
    status, answer, _ = run(file, "inspect", world.folder / "none", "--json")
    assert (status, answer["error"]["code"]) == (2, "no-program")


# ---- the node's own key


@pytest.mark.parametrize("make", [keygen.by_libcrypto, keygen.by_program, make_key_and_csr])
def test_key_and_request_fit_together(make: Any) -> None:
    key_pem, csr_pem = make("n-0123456789abcdef")
    key, csr = load_pem_private_key(key_pem, None), x509.load_pem_x509_csr(csr_pem)
    assert csr.is_signature_valid
    assert csr.public_key() == key.public_key()
    assert csr.public_key().curve.name == "secp256r1"  # type: ignore[union-attr]
    assert csr.subject.rfc4514_string() == "CN=n-0123456789abcdef"
    assert make("n-0123456789abcdef")[0] != key_pem


def test_key_making_fails_with_words() -> None:
    with pytest.raises(MachineError) as caught:
        keygen.by_program("n-1", program="no-such-program")
    assert caught.value.code == "keygen-failed"
    assert "no-such-program" in caught.value.text
    with pytest.raises(InputError):
        make_key_and_csr("a/b=c")


def test_key_making_leaks_nothing() -> None:
    """Every object is freed: fifty keys leave the process as large as ten did."""
    status = Path("/proc/self/statm")
    for _ in range(10):
        keygen.by_libcrypto("n-1")
    before = int(status.read_text().split()[1])
    for _ in range(50):
        keygen.by_libcrypto("n-1")
    assert int(status.read_text().split()[1]) - before < 128, "pages of 4 KiB"
