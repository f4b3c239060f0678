"""Packing a module: the same bytes each time, and what is wrong is refused."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from instar.core.errors import InstarError
from instar.trust.module import module_digest
from instar_lab import modules as lab
from instar_server.trust.module_source import pack_module
from instar_server.trust.pack import release_of
from tests.runner.compilers import need
from tests.trust.modules import MAIN, NAME, PATH, TOML, Source


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
