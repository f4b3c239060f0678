"""packages.list: in the sandbox as it is shipped, and the same source as a native module, over the same databases."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import Module, compile_parts
from tests.runner.conftest import Runner

Get = Callable[[str], Module]
REAL = "/var/lib/dpkg/status"
PATHS = (REAL, "/lib/apk/db/installed")
SMALL = """\
Package: libssl3
Status: install ok installed
Priority: optional
Architecture: amd64
Version: 3.0.11-1~deb12u2
Description: Secure Sockets Layer toolkit
 Package: not-one
 .
 more

Package: old-config
Status: deinstall ok config-files
Architecture: amd64
Version: 1.0

Package: halfway
Status: install ok unpacked
Architecture: all
Version: 2:7

Package: openssl
Version: 3.0.11
Status: hold ok installed
Architecture: arm64
"""
APK = "C:Q1=\nP:musl\nV:1.2.4-r2\nA:x86_64\nF:lib\nR:P:wrong\n\nP:busybox\nV:1.36\nA:x86_64\n"


def wasm_over(module: Module, dpkg: bytes | None, apk: bytes | None, tmp_path: Path) -> Module:
    """The module, built to read its databases elsewhere: the real ones cannot be changed here."""
    return variant(module, dpkg, apk, tmp_path, "packages.wasm", "wasm")


def native_over(module: Module, dpkg: bytes | None, apk: bytes | None, tmp_path: Path) -> Module:
    return variant(module, dpkg, apk, tmp_path, "packages.so", "native")


def variant(
    module: Module, dpkg: bytes | None, apk: bytes | None, tmp_path: Path, made: str, runs: str
) -> Module:
    folder = tmp_path / f"built-{runs}"
    shutil.copytree(module.folder, folder, dirs_exist_ok=True)
    files = (tmp_path / "status", tmp_path / "installed")
    source = folder / "packages.c"
    text = source.read_text()
    for path, file, content in zip(PATHS, files, (dpkg, apk), strict=True):
        text = text.replace(f'"{path}"', f'"{file}"')
        if content is not None:
            file.write_bytes(content)
    source.write_text(text)
    compile_parts(folder, made, ["packages.c"])
    manifest = module.manifest | {
        "runs": runs,
        "entry": {"any": made},
        "touches": {"read": [str(file) for file in files]},
    }
    return replace(module, folder=folder, manifest=manifest)


@pytest.fixture(params=["wasm", "native"])
def over(request: pytest.FixtureRequest, first_day: Get, tmp_path: Path) -> Callable[..., Module]:
    """over(dpkg, apk): the module of each kind, over these databases."""
    make = {"wasm": wasm_over, "native": native_over}[request.param]
    return lambda dpkg, apk=None: make(first_day("packages.list"), dpkg, apk, tmp_path)


def listed(reply: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(one["name"], one["version"], one["arch"]) for one in reply["packages"]]


class TestSmall:
    def test_what_is_installed(self, over: Callable[..., Module]) -> None:
        reply = over(SMALL.encode()).run().reply
        assert listed(reply) == [("libssl3", "3.0.11-1~deb12u2", "amd64"), ("openssl", "3.0.11", "arm64")]
        assert {name: value for name, value in reply.items() if name != "packages"} == {
            "databases": ["dpkg"], "count": 2, "next": None, "unfinished": 1, "unreadable": 0,
        }  # fmt: skip

    def test_both_databases(self, over: Callable[..., Module]) -> None:
        reply = over(SMALL.encode(), APK.encode()).run({"match": "S"}).reply
        assert [name for name, _, _ in listed(reply)] == ["libssl3", "openssl", "musl", "busybox"]
        assert reply["databases"] == ["dpkg", "apk"]

    def test_match_and_count(self, over: Callable[..., Module]) -> None:
        module = over(SMALL.encode())
        assert [name for name, _, _ in listed(module.run({"match": "LIBSSL"}).reply)] == ["libssl3"]
        assert listed(module.run({"match": "nope"}).reply) == []
        reply = module.run({"count_only": True}).reply
        assert (reply["count"], reply["packages"]) == (2, [])

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ({"match": 7}, "'match': expected a text"),
            ({"match": "x" * 300}, "expected at most 255 bytes as 'match'"),
            ({"count_only": "yes"}, "'count_only': expected true or false"),
            ({"skip": -1}, "expected 0 or more as 'skip'"),
            ({"skip": 1.5}, "'skip': expected a whole number"),
            ({"mach": "ssl"}, "expected 'match', 'count_only' or 'skip', got 'mach'"),
            ({"match": 'a"b{', "x": 1}, "got 'x'"),
            ({"match": {"match": 1, "y": []}}, "expected at most 255 bytes|no package|'match'"),
        ],
    )
    def test_wrong_arguments(self, over: Callable[..., Module], args: dict[str, Any], words: str) -> None:
        end = over(SMALL.encode()).run(args)
        if end.answer["ok"]:  # a list or an object is its JSON text: it matches nothing
            assert end.reply["count"] == 0
            return
        assert any(word in end.answer["error"]["text"] for word in words.split("|")), end.answer

    def test_no_database(self, over: Callable[..., Module]) -> None:
        assert "expected a database of dpkg or apk, got neither" in over(None).error({})


HOSTILE = {
    "empty": b"",
    "zeros": bytes(300_000),
    "one line without an end": b"Package: " + b"x" * 3_000_000,
    "no names": b"Status: install ok installed\n\n" * 5_000,
    "invalid UTF-8": b'Package: \xff\xfe"\\\x01\nStatus: install ok installed\nVersion: \xc3\n\n',
    "carriage returns": b"Package: dos\r\nStatus: install ok installed\r\nVersion: 1\r\n\r\n",
    "long fields": b"Package: "
    + b"n" * 500
    + b"\nStatus: install ok installed\nVersion: "
    + b"v" * 5000
    + b"\n\n",
    "chance": random.Random(3).randbytes(500_000),
    "mixed": bytes(
        random.Random(4).choice(b"Package: x\nStatus:installed\n\n\xff\0") for _ in range(200_000)
    ),
}


class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_both_kinds_see_the_same_and_neither_breaks(
        self, first_day: Get, tmp_path: Path, name: str
    ) -> None:
        module = first_day("packages.list")
        replies = []
        for make in (wasm_over, native_over):
            end = make(module, HOSTILE[name], None, tmp_path).run()
            assert end.signal == 0
            replies.append(end.reply)
        assert replies[0] == replies[1]
        assert replies[0]["count"] >= len(replies[0]["packages"])

    def test_a_huge_database_comes_in_pages(self, first_day: Get, tmp_path: Path) -> None:
        stanza = "Package: package-{0:06}\nStatus: install ok installed\nArchitecture: amd64\nVersion: {0}\n{1}\n\n"
        padding = "Description: " + "words " * 60
        content = "".join(stanza.format(number, padding) for number in range(20_000)).encode()
        module = native_over(first_day("packages.list"), content, None, tmp_path)
        names, skip, pages = [], 0, 0
        while skip is not None:
            reply = module.run({"skip": skip}).reply
            assert reply["count"] == 20_000
            names += [one["name"] for one in reply["packages"]]
            skip, pages = reply["next"], pages + 1
        assert names == [f"package-{number:06}" for number in range(20_000)]
        assert pages < 20
        sandboxed = wasm_over(first_day("packages.list"), content, None, tmp_path)
        assert sandboxed.run({"skip": 19_999}).reply["packages"] == [
            {"name": "package-019999", "version": "19999", "arch": "amd64"}
        ]
        assert len(sandboxed.run().reply["packages"]) == len(module.run().reply["packages"]) > 1000


class TestThisMachine:
    def test_it_is_what_dpkg_says(self, first_day: Get) -> None:
        if shutil.which("dpkg-query") is None or not Path(REAL).exists():
            pytest.skip("no dpkg on this machine")
        form = "${Package}\t${Version}\t${Architecture}\t${db:Status-Status}\n"
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True, timeout=30
        )
        rows = [line.split("\t") for line in done.stdout.splitlines()]
        expected = {(row[0], row[1], row[2]) for row in rows if row[3] == "installed"}
        module, found, skip = first_day("packages.list"), set(), 0
        while skip is not None:
            reply = module.run({"skip": skip}).reply
            found |= set(listed(reply))
            skip = reply["next"]
        assert found == expected
        assert reply["count"] == len(expected)

    def test_it_can_read_nothing_else(self, first_day: Get, tmp_path: Path) -> None:
        """A database that is a link out of what the manifest names is refused."""
        module = wasm_over(first_day("packages.list"), None, None, tmp_path)
        (tmp_path / "status").symlink_to(REAL if Path(REAL).exists() else "/etc/passwd")
        narrow = replace(module, manifest=module.manifest | {"touches": {"read": ["/nowhere/at/all"]}})
        assert "cannot be read" in narrow.error({})

    def test_the_shipped_one_is_the_sandboxed_one(self, first_day: Get, runner: Runner) -> None:
        module = first_day("packages.list")
        assert (module.manifest["runs"], set(module.manifest["entry"])) == ("wasm", {"any"})
        assert (module.folder / "packages.wasm").read_bytes()[:4] == b"\0asm"
        assert os.path.getsize(module.folder / "packages.wasm") < 32_768
