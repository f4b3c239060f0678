"""The node program's build: the same bytes everywhere, nothing of the machine in it, runs where it must."""

from __future__ import annotations

import io
import marshal
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tuf

from instar.core.errors import InputError
from instar.trust.program import join_program, program_digest
from instar_lab.program import build, canonical

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("node/src", "server/src", "lab/src")


@pytest.fixture(scope="module")
def program() -> build.Program:
    return build.build("1.1.0")


@pytest.fixture(scope="module")
def program_file(program: build.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "instar.pyz"
    build.write(program, path)
    return path


def copy_sources(folder: Path) -> Path:
    for source in SOURCES:
        shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return folder


def build_in(folder: Path, hash_seed: str, umask: int, warm_up: str) -> bytes:
    """Build from the sources in `folder`, in a process of its own."""
    out = folder / "out.pyz"
    code = (
        f"import os, sys; os.umask({umask}); {warm_up}\n"
        "from instar_lab.program import build\n"
        f"sys.exit(build.main(['--version', '1.1.0', '--out', {str(out)!r}]))"
    )
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(str(folder / source) for source in SOURCES),
        "PYTHONHASHSEED": hash_seed,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=env, cwd=folder, timeout=120, capture_output=True
    )
    return out.read_bytes()


def test_same_source_same_bytes(tmp_path: Path, program: build.Program) -> None:
    """Two folders, umasks, hash seeds, and what the process had imported before; then one changed byte."""
    first, second = copy_sources(tmp_path / "a"), copy_sources(tmp_path / "b" / "deeper")
    one = build_in(first, "1", 0o077, "import email.message, decimal, typing")
    two = build_in(second, "4242", 0o000, "pass")
    assert one == two == program.data

    with (second / "node/src/instar/__init__.py").open("a") as file:
        file.write("\n")
    assert build_in(second, "4242", 0o000, "pass") != one


def test_digest_leaves_the_comment_out(program: build.Program) -> None:
    assert program_digest(program.data) == program.digest
    assert program_digest(join_program(program.data, b"YQ==.Yg==")) == program.digest


def test_no_path_of_this_machine(program: build.Program) -> None:
    for secret in (str(ROOT), sys.prefix, f"{Path.home()}/", str(Path(tuf.__file__).parent)):
        assert secret.encode() not in program.data, secret


def test_holds_sources_and_licences_only(program: build.Program) -> None:
    with zipfile.ZipFile(io.BytesIO(program.data)) as archive:
        names = archive.namelist()
        assert names == sorted(names)
        assert archive.read("instar/version.py").decode().endswith('VERSION = "1.1.0"\n')
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    code = [name for name in names if not name.startswith("licences/")]
    assert {name.rpartition(".")[2] for name in code} == {"py", "pyc"}
    assert all(f"{name}c" in names for name in code if name.endswith(".py"))
    assert {name.split("/")[0] for name in code} == {
        "__main__.py", "__main__.pyc", "instar", "securesystemslib", "tuf",
    }  # fmt: skip
    assert {name.split("/")[1] for name in names if name.startswith("licences/")} == set(build.LIBRARIES)


def test_says_when_it_was_built_only_if_told(
    program: build.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(made: build.Program) -> str:
        path = tmp_path / "built.pyz"
        build.write(made, path)
        code = (
            f"import sys; sys.path.insert(0, {str(path)!r}); from instar.version import BUILT; print(BUILT)"
        )
        line = [sys.executable, "-I", "-S", "-c", code]
        return subprocess.run(line, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    assert built(program) == ""
    assert built(build.build("1.1.0", built="2026-01-02T03:04:05+01:00")) == "2026-01-02T02:04:05Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert built(build.build("1.1.0")) == "2023-11-14T22:13:20Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    for wrong in (lambda: build.build("1.1.0"), lambda: build.build("1.1.0", built="2026-01-02")):
        with pytest.raises(InputError) as refused:
            wrong()
        assert refused.value.code == "bad-date"


def test_size(program: build.Program) -> None:
    """A node fetches this whole at first: a sudden growth wants a look."""
    assert (
        len(program.data) < 4_700_000
    )  # with the updater's API, the beacon, the slots and the line that fills them


def run(python: str, path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-I", "-S", str(path), *args], capture_output=True, text=True, timeout=60, check=False
    )


def test_starts_isolated(program_file: Path) -> None:
    done = run(sys.executable, program_file, "version")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1.1.0" in done.stdout


def other_pythons() -> list[str]:
    """Interpreters on PATH of another minor version that a node may have."""
    found = []
    for minor in (11, 12, 13, 14):
        python = shutil.which(f"python3.{minor}")
        if python is None or minor == sys.version_info.minor:
            continue
        if subprocess.run([python, "-c", ""], capture_output=True, check=False, timeout=30).returncode == 0:
            found.append(python)
    return found


def test_starts_with_another_minor_version(program_file: Path) -> None:
    """The .pyc are for the version that builds; another one takes the .py."""
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python from 3.11 on is on PATH")
    for python in pythons:
        done = run(python, program_file, "version")
        assert (done.returncode, done.stderr) == (0, ""), python
        assert "1.1.0" in done.stdout


def test_compiled_code_is_used(program_file: Path) -> None:
    """With another source but the same .pyc, the .pyc wins: nothing is compiled at start."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import instar.core.errors as m; print(m.__file__)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(program_file)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip().endswith("errors.pyc")


@pytest.mark.parametrize("version", ["", "1", "1.2", "1.2.3.4", "1.2.x", "v1.2.3", "1.2.3\n", "1.2.-3"])
def test_refuses_a_version_that_is_none(version: str) -> None:
    with pytest.raises(InputError) as refused:
        build.build(version)
    assert refused.value.code == "bad-version"


SNIPPETS = [
    "x = {'a', 'b', 'c', 'a longer text with spaces'} & {'a'}",
    "def f(a, /, b=1.5, *c, d='ä', **e):\n    'Docs.'\n    return (a, c, d, e, 1 << 70, -3, 2j, b'x', ...)",
    "class A[T]: ..." if sys.version_info >= (3, 12) else "class A: ...",
    "async def g():\n    async with a as b:\n        yield b in ('q', 'w', 3, None, True)",
    "try:\n    import x\nexcept* ValueError as e:\n    raise\nfinally:\n    print(f'{e!r:>{10}}')",
    "text = " + repr("word " * 100) + "\nname = " + repr("n" * 300),
]


@pytest.mark.parametrize("source", SNIPPETS)
def test_canonical_code_is_the_same_code(source: str) -> None:
    code = compile(source, "snippet.py", "exec", dont_inherit=True)
    again = marshal.loads(canonical.dumps(code))
    assert again == code
    assert list(again.co_positions()) == list(code.co_positions())
    assert canonical.dumps(again) == canonical.dumps(code)


def test_canonical_code_of_the_standard_library() -> None:
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
        code = compile(path.read_bytes(), "x.py", "exec", dont_inherit=True)
        assert marshal.loads(canonical.dumps(code)) == code, path


def test_canonical_refuses_what_is_no_code() -> None:
    with pytest.raises(ValueError, match="unknown type"):
        canonical.Reader(marshal.dumps({"a": 1})).node()
