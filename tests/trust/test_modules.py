"""Modules and trust: packing refuses what is wrong, and `fetch-module` what an attacker, a mirror or time does to one.

`fetch-module` runs as it does on a node: from the built program, over mTLS, with a real repository behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Timestamp

from instar.core.errors import InstarError
from instar.host.layout import Layout
from instar.host.line import Line
from instar.host.records import write_artifacts
from instar.trust.module import module_digest
from instar_lab import modules as lab
from instar_server.trust.module_source import pack_module
from instar_server.trust.pack import Release, release_of
from tests.node.world import member, tar_gz
from tests.runner.compilers import need
from tests.trust.test_verify_over_tls import Gateway, Handler, gateway, pyz  # noqa: F401
from tests.trust.world import World, now

NAME = "demo.once"
PATH = f"module/{NAME}-1.0.0.tar.gz"
TOML = """\
name = "demo.once"
version = "{version}"
about = "Says what it was asked"
runs = "python"
mode = "oneshot"

[entry]
any = "main.py"
"""
MAIN = "def run(args, context):\n    return args\n"
Source = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """source({"main.py": …}, version="1.0.0", toml=…) -> a module's folder"""

    def make(files: dict[str, str | bytes] | None = None, version: str = "1.0.0", toml: str = TOML) -> Path:
        folder = tmp_path / f"source-{len(list(tmp_path.glob('source-*')))}"
        folder.mkdir()
        (folder / "module.toml").write_text(toml.replace("{version}", version))
        for path, content in (files if files is not None else {"main.py": MAIN}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    return make


# ---- packing


def test_a_module_is_packed_the_same_each_time(source: Source) -> None:
    files: dict[str, str | bytes] = {
        "main.py": MAIN,
        "lib/more.py": "x = 1\n",
        "tool.sh": "#!/bin/sh\n",
        ".hidden": "x",
    }
    one, two = source(files), source(dict(reversed(files.items())))
    for folder in (one, two):
        (folder / "tool.sh").chmod(0o755)
        (folder / "lib" / "__pycache__").mkdir()
        (folder / "lib" / "__pycache__" / "more.pyc").write_bytes(os.urandom(8))
    os.utime(two / "main.py", (1, 1))
    (two / "main.py").chmod(0o600)
    release = pack_module(one)
    assert pack_module(two) == release == release_of(release.archive)
    assert release.path == PATH
    assert release.custom == {
        "kind": "module", "name": NAME, "version": "1.0.0", "digest": release.digest, "runs": "python", "mode": "oneshot",
    }  # fmt: skip
    path = one / "archive"
    path.write_bytes(release.archive)
    with tarfile.open(path) as tar:
        assert [(m.name, m.mode) for m in tar] == [
            ("manifest.json", 0o644), ("lib/more.py", 0o644), ("main.py", 0o644), ("tool.sh", 0o755),
        ]  # fmt: skip
        first = tar.extractfile("manifest.json")
        assert first is not None
        assert module_digest(first.read()) == release.digest


ELF_ARM64 = (
    b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + (183).to_bytes(2, "little") + bytes(44)
)
NATIVE = TOML.replace('"python"', '"native"').replace("any =", "x86_64 =")
WASM = TOML.replace('"python"', '"wasm"')
WRONG: dict[str, tuple[str, dict[str, str | bytes], str]] = {
    "no TOML": ("name = ", {}, "cannot pack module.toml: "),
    "not text": ("\0", {}, "line 1"),
    "a misspelt key": (TOML.replace("about", "abuot"), {}, "abuot: there is no such key; did you mean 'about'?"),
    "a misspelt limit": (TOML + "[limits]\nmemroy = 5\n", {}, "limits.memroy: there is no such key; did you mean 'memory'?"),
    "a limit that is text": (TOML + "[limits]\nmemory = '1G'\n", {}, "'memory' to be int"),
    "a huge limit": (TOML + f"[limits]\nmemory = {1 << 60}\n", {}, "'memory'"),
    "a time without end": (TOML + "[timeouts]\nrun_s = inf\n", {}, "Infinity"),
    "a time too long": (TOML + "[timeouts]\nrun_s = 1e9\n", {}, "0.1 to 86400 seconds"),
    "a table that is none": (TOML.replace("[entry]", "limits = 3\n[entry]"), {}, "limits: expected a table [limits]"),
    "a bad name": (TOML.replace(NAME, "../etc"), {}, "module name"),
    "a bad version": (TOML.replace("{version}", "one"), {}, "version"),
    "an unknown kind": (TOML.replace('"python"', '"perl"'), {}, "'runs' to be one of python, native, wasm"),
    "no name": (TOML.replace('name = "demo.once"', ""), {}, "'name' is missing"),
    "a stateful one-shot": (TOML.replace("[entry]", "stateful = true\n[entry]"), {}, "only a service"),
    "a date": (TOML.replace('"Says what it was asked"', "2026-01-01"), {}, "date"),
    "an entry that is not there": (TOML, {"other.py": MAIN}, "entry.any: expected a file of the folder, got 'main.py' (there is: other.py)"),
    "nothing but module.toml": (TOML, {"main.pyc/.x": ""}, "there is: nothing"),
    "an entry that is no text": (TOML.replace('"main.py"', "[1]"), {}, "entry.any"),
    "an entry outside": (TOML.replace('"main.py"', '"../main.py"'), {}, "entry.any: expected a file of the folder"),
    "a touch that is relative": (TOML + '[touches]\nread = ["etc"]\n', {}, "absolute paths"),
    "a manifest of its own": (TOML, {"main.py": MAIN, "manifest.json": "{}"}, "must not be there"),
    "a colon in a name": (TOML, {"main.py": MAIN, "a:b": ""}, "a:b"),
    "a name that is too long for an archive": (TOML, {"main.py": MAIN, "x" * 120: ""}, "name is too long"),
    "Python that is none": (TOML, {"main.py": "def run(:\n"}, "main.py line 1"),
    "a library for every machine": (NATIVE.replace("x86_64 =", "any ="), {"main.py": ELF_ARM64}, "a file for each machine"),
    "a library that is none": (NATIVE, {"main.py": b"MZ"}, "expected a shared library (ELF)"),
    "a library for another machine": (NATIVE, {"main.py": ELF_ARM64}, "expected a library for x86_64, got one for aarch64"),
    "WebAssembly that is none": (WASM, {"main.py": b"\x7fELF"}, "expected WebAssembly"),
    "a build of nothing": (TOML + '[build]\n"x.so" = "x.c"\n', {}, "build.x.so: expected a list"),
    "a build outside": (TOML + '[build]\n"../x.so" = ["x.c"]\n', {}, "leads out"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_what_is_wrong_is_not_packed_and_the_words_say_where(source: Source, case: str) -> None:
    toml, files, words = WRONG[case]
    folder = source(files or None, toml=toml)
    with pytest.raises(InstarError) as caught:
        pack_module(folder)
    assert words in caught.value.text, caught.value.text
    assert caught.value.exit_status in (2, 3)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "pipe"])
def test_links_and_pipes_are_not_packed(source: Source, kind: str) -> None:
    folder = source()
    if kind == "pipe":
        os.mkfifo(folder / "odd")
    else:
        (folder / "odd").symlink_to({"file": "main.py", "folder": "/etc", "dangling": "nowhere"}[kind])
    with pytest.raises(InstarError, match="odd: expected a regular file"):
        pack_module(folder)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InstarError) as caught:
        pack_module(tmp_path / "none")
    assert caught.value.code == "no-file"


def test_what_was_compiled_is_packed_without_its_sources(source: Source) -> None:
    need("cc")
    machine = os.uname().machine
    toml = NATIVE.replace('x86_64 = "main.py"', f'{machine} = "{machine}/a.so"\npdp11 = "pdp11/a.so"')
    toml += '[build]\n"{machine}/a.so" = ["a.c", "-lm"]\n'
    folder = source(
        {"a.c": '#include "a.h"\nint value(void) { return A; }\n', "a.h": "#define A 1\n"}, toml=toml
    )
    release = lab.pack(folder)
    assert lab.pack(folder) == release, "the same source and compiler give the same bytes"
    with pytest.raises(InstarError, match=f"entry.{machine}: expected a file of the folder"):
        pack_module(folder)
    out = folder.parent / "out"
    lab.build(folder, out)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "a.c", "a.h", "module.toml", f"{machine}/a.so",
    ]  # fmt: skip
    (folder / "a.c").write_text("int value(void) { return A; }\n")
    with pytest.raises(InstarError) as caught:
        lab.pack(folder)
    assert caught.value.code == "does-not-compile"
    assert "A" in caught.value.text


# ---- what a repository can hold


def forged(manifest: bytes, files: dict[str, bytes], path: str = PATH, **custom: str) -> Release:
    """What signers were made to sign: any manifest, any files, any words about them."""
    members = [member("manifest.json", manifest), *(member(name, data) for name, data in files.items())]
    archive = tar_gz(members)
    said = {"kind": "module", "name": NAME, "version": "1.0.0", "digest": module_digest(manifest), "runs": "python",
            "mode": "oneshot", **custom}  # fmt: skip
    return Release(path, archive, hashlib.sha256(archive).hexdigest(), said)


def manifest(contents: dict[str, bytes], **changes: Any) -> bytes:
    listed = [
        {"path": p, "size": len(b), "sha256": hashlib.sha256(b).hexdigest(), "mode": "0644"}
        for p, b in contents.items()
    ]
    body = {"format": 1, "kind": "module", "name": NAME, "version": "1.0.0", "runs": "python", "mode": "oneshot",
            "entry": {"any": "main.py"}, "files": listed}  # fmt: skip
    return json.dumps({**body, **changes}).encode()


FILES = {"main.py": MAIN.encode()}
GOOD = manifest(FILES)


class RangeHandler(Handler):
    """Also serves targets, with ranges; `world.tamper` may hold bytes for a target's path, `world.cut_at` ends answers."""

    def do_GET(self) -> None:
        path = self.path.removeprefix("/v1/targets/")
        if path == self.path:
            super().do_GET()
            return
        world = self.server.world
        file = world.repository.target_file(path)
        data = world.tamper.get(path) or (file.read_bytes() if file else b"")
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        world.asked.append(f"{path}@{start}")
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cuts: list[int] = world.cut_at  # type: ignore[attr-defined]
        end = cuts.pop(0) if cuts else len(data)
        self.wfile.write(data[start:end])
        if end < len(data):
            self.close_connection = True


class Fetcher:
    """One node and its `fetch-module`."""

    def __init__(self, world: World, program: Path) -> None:
        self.world, self.program = world, program
        self.layout = Layout(world.trust.parent)
        self.world.cut_at = []  # type: ignore[attr-defined]

    @property
    def line(self) -> Line:
        return Line(self.layout.module(NAME))

    def publish(self, release: Release) -> Release:
        data = self.world.sign_targets(self.world.with_release(release))
        self.world.repository.publish_targets(data, now())
        self.world.targets_bytes = data
        return release

    def command(self, release: Release, **options: str) -> list[str]:
        words = {
            "name": NAME,
            "version": "1.0.0",
            "digest": release.digest,
            "target": PATH,
            "within": "60",
            **options,
        }
        flags = [part for name, value in words.items() for part in (f"--{name}", value)]
        return [
            sys.executable,
            "-I",
            "-S",
            str(self.program),
            "fetch-module",
            "--state",
            str(self.layout.state),
            *flags,
        ]

    def start(self, release: Release, **options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(release, **options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={"PATH": os.environ["PATH"]},
        )  # fmt: skip

    def fetch(self, release: Release, **options: str) -> dict[str, Any]:
        child = self.start(release, **options)
        out, err = child.communicate(timeout=60)
        lines = out.splitlines()
        assert len(lines) == 1, (child.returncode, out, err)
        answer: dict[str, Any] = json.loads(lines[0])
        assert (child.returncode == 0) is answer["ok"], (child.returncode, answer)
        return answer

    def refused(self, release: Release, code: str, kind: str, *words: str, **options: str) -> None:
        """It says no in the right words, and nothing of it can be run."""
        before = sorted(path for path in self.layout.state.rglob("*") if "modules" not in path.parts)
        answer = self.fetch(release, **options)
        assert answer["ok"] is False
        assert (answer["error"]["code"], answer["kind"]) == (code, kind), answer
        for word in words:
            assert word in answer["error"]["text"], answer
        assert not [name for name in self.line.names() if self.line.is_valid(name)]
        assert not list(self.layout.state.rglob("evil*"))
        after = sorted(path for path in self.layout.state.rglob("*") if "modules" not in path.parts)
        assert [p for p in after if p not in before and "trust" not in p.parts] == []


@pytest.fixture
def node(world: World, gateway: Gateway, pyz: Path) -> Fetcher:  # noqa: F811
    gateway.RequestHandlerClass = RangeHandler
    return Fetcher(world, pyz)


def test_a_module_is_fetched_once_and_kept(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source()))
    answer = node.fetch(release)
    assert answer == {"ok": True, "release": f"1.0.0-{release.digest[:12]}"}
    node.line.check(answer["release"])
    folder = node.line.folder(answer["release"])
    assert (folder / "main.py").read_text() == MAIN
    assert (folder / "main.py").stat().st_mode & 0o777 == 0o444
    assert not list(node.layout.module(NAME).incoming.iterdir())
    node.world.asked.clear()
    assert node.fetch(release) == answer
    assert node.world.asked == [], "what is there needs no server"


def test_a_module_is_fetched_from_where_metadata_and_targets_are(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source()))
    known = json.loads(node.layout.node.read_bytes())
    node.layout.node.write_text(json.dumps({**known, "server": "https://127.0.0.1:1"}))
    node.layout.run.mkdir()
    write_artifacts(node.layout, known["server"])
    assert node.fetch(release)["ok"]
    assert any(path.endswith("@0") for path in node.world.asked), "it was asked there"


def test_a_cut_is_resumed_also_after_a_kill(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source({"main.py": MAIN, "noise": os.urandom(300_000)})))
    part = node.layout.module(NAME).incoming / f"{release.digest}.part"
    (node.layout.module(NAME).incoming).mkdir(parents=True)
    part.with_name("other.part").write_bytes(b"left by another fetch")
    part.write_bytes(release.archive[:100_000])
    node.world.cut_at = [200_000]  # type: ignore[attr-defined]
    assert node.fetch(release)["ok"] is True
    starts = [asked.rpartition("@")[2] for asked in node.world.asked if "@" in asked]
    assert starts == ["100000", "200000"]
    assert not part.with_name("other.part").exists()


def test_killed_at_any_time_it_is_done_by_the_next(node: Fetcher, source: Source) -> None:
    release = node.publish(
        pack_module(source({"main.py": MAIN, **{f"f{n}": os.urandom(2000) for n in range(30)}}))
    )
    name = f"1.0.0-{release.digest[:12]}"
    for number in range(12):
        child = node.start(release)
        time.sleep(0.05 + 0.05 * number)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=30)
        marked = (node.line.folder(name) / "valid").exists()
        assert marked is node.line.is_valid(name), "half of it counts as whole"
    assert node.fetch(release)["ok"] is True
    node.line.check(name)


def test_many_at_once_fetch_it_once(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source({"main.py": MAIN, "noise": os.urandom(50_000)})))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: node.fetch(release), range(4)))
    assert all(answer["ok"] for answer in answers), answers
    assert len([asked for asked in node.world.asked if "@" in asked]) == 1


# ---- attacks


def test_another_manifest_than_was_signed(node: Fetcher) -> None:
    other = manifest(FILES, about="another one")
    wanted = module_digest(GOOD)
    release = node.publish(forged(other, FILES, digest=wanted))
    node.refused(release, "altered-manifest", "trust", wanted[:12], module_digest(other)[:12])


def test_a_file_that_is_not_the_manifests(node: Fetcher) -> None:
    release = node.publish(forged(GOOD, {"main.py": MAIN.replace("args", "argv", 1).encode()}))
    node.refused(release, "altered-file", "trust", "main.py")


def test_another_name_in_the_archive(node: Fetcher) -> None:
    release = node.publish(forged(manifest(FILES, name="demo.other"), FILES))
    node.refused(release, "altered-manifest", "trust", "expected module demo.once, got demo.other")


def test_another_version_in_the_archive(node: Fetcher) -> None:
    release = node.publish(forged(manifest(FILES, version="9.0.0"), FILES))
    node.refused(release, "altered-manifest", "trust", "9.0.0")


def test_a_module_of_another_name_under_the_path(node: Fetcher) -> None:
    release = node.publish(forged(manifest(FILES, name="demo.other"), FILES, name="demo.other"))
    node.refused(release, "wish-differs", "trust", "name demo.once", "demo.other")


@pytest.mark.parametrize("field", ["digest", "version", "kind"])
def test_words_of_the_signers_that_do_not_fit_the_job(node: Fetcher, field: str) -> None:
    other = {"digest": "0" * 96, "version": "2.0.0", "kind": "node"}[field]
    release = node.publish(forged(GOOD, FILES, **{field: other}))
    wanted = Release(PATH, b"", "", {"kind": "module", "digest": module_digest(GOOD)})
    node.refused(wanted, "wish-differs", "trust", field, other, digest=module_digest(GOOD))
    assert release.custom[field] == other


def test_a_node_program_is_no_module(node: Fetcher) -> None:
    program = node.world.repository.targets()[0]
    digest = program.custom["program_digest"]
    release = Release(program.path, b"", "", {"kind": "module", "digest": digest})
    node.refused(release, "wish-differs", "trust", version="1.1.0", target="node/instar-1.1.0.tar.gz")


def test_a_blob_that_a_mirror_altered(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source()))
    served = f"module/{release.sha256}.{NAME}-1.0.0.tar.gz"
    middle = len(release.archive) // 2
    data = bytearray(release.archive)
    data[middle] ^= 1
    node.world.tamper[served] = bytes(data)
    node.refused(release, "altered-blob", "trust")
    node.world.tamper[served] = release.archive + b"more"
    node.refused(release, "longer-than-signed", "trust")
    node.world.tamper.clear()
    assert node.fetch(release)["ok"] is True, "what was wrong is not kept for the next try"


ESCAPES: dict[str, tuple[bytes, dict[str, bytes]]] = {
    "out by dots": (manifest({**FILES, "../evil": b"x"}), {**FILES, "../evil": b"x"}),
    "absolute": (manifest({**FILES, "/tmp/evil": b"x"}), {**FILES, "/tmp/evil": b"x"}),
    "unlisted, out": (GOOD, {**FILES, "../../../evil": b"x"}),
    "unlisted": (GOOD, {**FILES, "evil": b"x"}),
    "the marker": (GOOD, {**FILES, "valid": b"x"}),
}


@pytest.mark.parametrize("case", list(ESCAPES))
def test_a_path_that_escapes(node: Fetcher, case: str) -> None:
    release = node.publish(forged(*ESCAPES[case]))
    node.refused(release, "bad-archive", "trust")
    assert not Path("/tmp/evil").exists()


def test_a_link_that_leads_out(node: Fetcher) -> None:
    said = manifest({**FILES, "data": b""})
    members = [
        member("manifest.json", said),
        member("main.py", MAIN.encode()),
        member("data", b"", tarfile.SYMTYPE, "/etc/shadow"),
    ]
    archive = tar_gz(members)
    custom = {"kind": "module", "name": NAME, "version": "1.0.0", "digest": module_digest(said)}
    release = node.publish(Release(PATH, archive, hashlib.sha256(archive).hexdigest(), custom))
    node.refused(release, "bad-archive", "trust", "symbolic link")


HUGE: dict[str, dict[str, Any]] = {
    "memory": {"limits": {"memory": 1 << 60}},
    "negative": {"limits": {"processes": -1}},
    "a truth": {"limits": {"files": True}},
    "seconds": {"timeouts": {"run_s": 1e300}},
    "files": {"files": [{"path": "main.py", "size": 1 << 50, "sha256": "0" * 64, "mode": "0755"}]},
    "depth": {"about": [[[[[[]]]]]]},
    "nobody's mode": {"files": [{"path": "main.py", "size": 1, "sha256": "0" * 64, "mode": "4755"}]},
}


@pytest.mark.parametrize("case", list(HUGE))
def test_a_manifest_with_huge_limits(node: Fetcher, case: str) -> None:
    release = node.publish(forged(manifest(FILES, **HUGE[case]), FILES))
    node.refused(release, "bad-archive", "trust")


def test_a_bomb_behind_a_good_manifest(node: Fetcher) -> None:
    release = node.publish(forged(GOOD, {"main.py": bytes(64 << 20)}))
    node.refused(release, "bad-archive", "trust", f"expected {len(MAIN)} bytes, got {64 << 20}")


def test_expired_metadata_keeps_new_ones_away_and_lets_old_ones_run(node: Fetcher, source: Source) -> None:
    first = node.publish(pack_module(source()))
    assert node.fetch(first)["ok"] is True
    second = node.publish(pack_module(source(version="1.1.0")))
    timestamp = Metadata[Timestamp].from_bytes(node.world.current("timestamp")[1])
    timestamp.signed.expires = now() - timedelta(hours=1)
    timestamp.sign(node.world.keys.timestamp)
    node.world.tamper = {"timestamp.json": timestamp.to_bytes()}
    answer = node.fetch(second, version="1.1.0", target=second.path)
    assert (answer["ok"], answer["error"]["code"], answer["kind"]) == (False, "expired-timestamp", "expired")
    assert node.fetch(first)["ok"] is True
    assert node.line.names() == [f"1.0.0-{first.digest[:12]}"]


def test_a_stale_mirror_and_a_target_that_is_not_there(node: Fetcher, source: Source) -> None:
    old = node.world.served()
    release = pack_module(source())
    node.refused(release, "no-such-target", "absent")
    node.publish(release)
    node.world.verify(PATH)
    node.world.tamper = dict(old)
    node.refused(release, "stale-mirror", "stale", "waiting")
    node.world.tamper.clear()
    assert node.fetch(release)["ok"] is True


def test_signatures_that_do_not_hold(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source()))
    name, targets = node.world.current("targets")
    node.world.tamper = {name: targets.replace(b"1.0.0", b"1.0.9")}
    node.refused(release, "altered-targets", "trust")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"name": "../../etc"}, "bad-module-name"),
        ({"name": ""}, "bad-module-name"),
        ({"version": "../1.0.0"}, "bad-version"),
        ({"digest": "../x"}, "bad-digest"),
        ({"digest": "A" * 96}, "bad-digest"),
        ({"target": "../../metadata/root.json"}, "bad-path"),
        ({"target": "/etc/passwd"}, "bad-path"),
    ],
)
def test_words_that_lead_elsewhere(node: Fetcher, options: dict[str, str], code: str) -> None:
    release = Release(PATH, b"", "", {"kind": "module", "digest": "0" * 96})
    node.refused(release, code, "input", **options)
    assert not node.layout.modules.exists()


def test_a_folder_of_the_same_short_name_is_not_taken_for_it(node: Fetcher, source: Source) -> None:
    """Twelve digits name a folder, all of them the release."""
    release = node.publish(pack_module(source()))
    assert node.fetch(release)["ok"] is True
    twin = release.digest[:12] + "0" * 84
    answer = node.fetch(release, digest=twin)
    assert answer["ok"] is False
    assert answer["error"]["code"] == "wish-differs"


def test_a_wrong_state_folder_is_left_alone(node: Fetcher, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    command = node.command(Release(PATH, b"", "", {"kind": "module", "digest": "0" * 96}))
    command[command.index("--state") + 1] = str(empty)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["error"]["code"] == "no-server"
    assert list(empty.iterdir()) == []


# ---- the operator's side refuses the same


@pytest.mark.parametrize("case", ["a file", "a path", "limits"])
def test_a_forged_archive_is_not_listed_for_signing(case: str) -> None:
    archive = {
        "a file": lambda: forged(GOOD, {"main.py": b"x" * len(MAIN)}),
        "a path": lambda: forged(*ESCAPES["out by dots"]),
        "limits": lambda: forged(manifest(FILES, limits={"memory": 1 << 60}), FILES),
    }[case]().archive
    with pytest.raises(InstarError):
        release_of(archive)
