"""WebAssembly modules through real runner processes: the same header and functions, and nothing outside the sandbox."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instar.runner import wrong
from instar.runner.adapt import FUNCTIONS
from tests.runner.compilers import HEADER, ROOT, SDK, TO_WASM, compiled, need_wasm, wasm
from tests.runner.conftest import Child, MakeModule, Runner

Make = Any


@pytest.fixture
def make(make_module: MakeModule) -> Make:
    """make(body) -> a wasm module `test.wasm` whose C source is `body`."""

    def build(body: str, mode: str = "oneshot", stateful: bool = False) -> dict[str, Any]:
        return make_module("test.wasm", {"m.wasm": wasm(body)}, runs="wasm", mode=mode, stateful=stateful)

    return build


def oneshot(body: str, before: str = "") -> str:
    """C source of a one-shot module whose `run` has this body."""
    return (
        f"{before}\nstatic int32_t run(const struct instar_host *host)\n{{\n(void)host;\n{body}\n}}\n"
        'INSTAR_ONESHOT("test.wasm", "1.0.0", run);\n'
    )


# --- one run


def test_arguments_in_and_a_reply_out(runner: Runner, make: Make) -> None:
    module = make(
        oneshot("""
        char text[64];
        instar_get_text(host, "who", text, sizeof text);
        instar_put_string(host, "who", text);
        instar_put_int(host, "big", instar_get_int(host, "big", 0));
        instar_put_int(host, "small", instar_get_int(host, "small", 0));
        instar_put_int(host, "none", instar_get_int(host, "none", -7));
        instar_put_double(host, "half", instar_get_double(host, "half", 0) / 2);
        instar_put_bool(host, "yes", instar_get_bool(host, "yes", 0));
        instar_put_int(host, "items", instar_count(host, "list"));
        instar_put_int(host, "absent", instar_count(host, "nothing"));
        instar_put_int(host, "second", instar_get_int(host, "/list/1", 0));
        instar_text(host, "done");
        return INSTAR_OK;""")
    )
    args = {"who": "Zoë", "big": 2**63 - 1, "small": -(2**63), "half": 3, "yes": True, "list": [1, 22]}
    assert runner.run(module, args).reply == {
        "who": "Zoë", "big": 2**63 - 1, "small": -(2**63), "none": -7, "half": 1.5, "yes": True, "items": 2,
        "absent": wrong.ABSENT, "second": 22, "text": "done",
    }  # fmt: skip


EVERY = """
    char out[64];
    instar_log(host, "a line");
    instar_progress(host, 0.25, "a quarter");
    instar_args(host, out, sizeof out);
    instar_kind(host, "a"); instar_count(host, "a"); instar_get_text(host, "b", out, sizeof out);
    instar_get_int(host, "a", 0); instar_get_double(host, "a", 0); instar_get_bool(host, "c", 0);
    instar_text(host, "t");
    instar_key(host, "o"); instar_begin_object(host); instar_end_object(host);
    instar_key(host, "l"); instar_begin_list(host);
    instar_string(host, "s"); instar_int(host, 1); instar_double(host, 1.5); instar_bool(host, 1);
    instar_null(host); instar_json(host, "{}");
    instar_int(host, instar_load(host, out, sizeof out));
    instar_int(host, instar_save(host, "{}"));
    instar_int(host, instar_data(host, out, sizeof out) > 0);
    instar_int(host, instar_file_read(host, "/etc/shadow", 0, out, sizeof out));
    instar_int(host, instar_file_list(host, "/", out, sizeof out));
    instar_bool(host, instar_now(host) > 1.7e9);
    instar_end_list(host);
    return instar_get_bool(host, "fail", 0) ? instar_fail(host, "no") : 0;"""


def test_every_function_of_the_header_can_be_imported(runner: Runner, make: Make, tmp_path: Path) -> None:
    code = wasm(oneshot(EVERY))
    assert all(function.name.encode() in code for function in FUNCTIONS)
    end = runner.run(make(oneshot(EVERY)), {"a": 1, "b": "x", "c": False}, data=str(tmp_path))
    refused = wrong.REFUSED
    listed = ["s", 1, 1.5, True, None, {}, refused, refused, 1, refused, refused, True]
    assert end.reply == {"o": {}, "l": listed, "text": "t"}
    assert end.lines[:2] == [{"log": "a line"}, {"progress": 0.25, "text": "a quarter"}]


def test_the_same_source_gives_the_same_reply_in_both_kinds(
    runner: Runner, make: Make, make_module: MakeModule
) -> None:
    from tests.runner.compilers import native

    args = {"a": 1, "b": "x", "c": False}
    source = oneshot(EVERY)
    other = make_module("test.wasm", {"m.so": native(source)}, runs="native", version="2.0.0")
    data = str(runner.cwd)
    assert runner.run(make(source), args, data=data).reply == runner.run(other, args, data=data).reply


def test_the_header_is_good_for_cpp(runner: Runner, make_module: MakeModule) -> None:
    need_wasm()
    flags = ["-Wall", "-Wextra", "-Werror", "-O2", "-I", str(SDK)]
    source = HEADER + oneshot('return instar_put_string(host, "said", "from C++");')
    code = compiled(["clang++", *TO_WASM, *flags], ".cpp", source)
    module = make_module("test.wasm", {"m.wasm": code}, runs="wasm")
    assert runner.run(module).reply == {"said": "from C++"}


def test_it_fails_with_its_own_words_or_its_number(runner: Runner, make: Make) -> None:
    end = runner.run(make(oneshot('return instar_fail(host, "cannot find the moon");')))
    assert (end.code, end.answer["error"]["text"]) == ("module-failed", "cannot find the moon")
    assert "got 42" in runner.run(make(oneshot("return 42;"))).answer["error"]["text"]


def test_a_reply_that_would_be_no_json_is_refused(runner: Runner, make: Make) -> None:
    assert runner.run(make(oneshot("return instar_int(host, 1);"))).code == "bad-reply"


# --- the sandbox


def test_only_what_the_manifest_names_can_be_read(runner: Runner, make: Make, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "file").write_text("hello")
    (inside / "out").symlink_to("/etc/passwd")
    module = make(
        oneshot("""
        char text[200], path[300];
        instar_get_text(host, "path", path, sizeof path);
        int64_t n = instar_file_read(host, path, 0, text, sizeof text);
        instar_put_int(host, "n", n);
        instar_key(host, "text");
        instar_string_n(host, text, n > 0 ? (uint32_t)n : 0);
        return 0;""")
    )

    def read(path: Path | str) -> Any:
        return runner.run(module, {"path": str(path)}, touches={"read": [str(inside)]}).reply

    assert read(inside / "file") == {"n": 5, "text": "hello"}
    assert read(inside / "none")["n"] == wrong.ABSENT
    for path in (inside / "out", "/etc/passwd", f"{inside}/../../../etc/passwd", "/proc/self/environ"):
        assert read(path)["n"] == wrong.REFUSED, path


def test_its_own_data_can_be_read(runner: Runner, make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    module = make(
        oneshot("""
        char path[300], text[8] = "";
        int32_t length = instar_data(host, path, sizeof path - 8);
        for (int i = 0; i < 6; i++)
            path[length + i] = "/file"[i];
        instar_file_read(host, path, 0, text, sizeof text);
        return instar_put_string(host, "text", text);""")
    )
    assert runner.run(module, data=str(tmp_path)).reply == {"text": "mine"}


def test_a_pointer_outside_its_memory_is_an_error(runner: Runner, make: Make) -> None:
    for body in (
        "instar_string_n(host, (const char *)0x7ffffff0, 4)",
        "instar_string_n(host, (const char *)0xfffffff0, 0xff)",
        "instar_args(host, (char *)0xffffff00, 100)",
    ):
        end = runner.run(make(oneshot(f'instar_key(host, "k"); (void){body}; return 0;')))
        assert end.code == "module-failed", body
        assert "the module's own memory" in end.answer["error"]["text"]


def test_without_wasmtime_it_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from instar.core.errors import InstarError\n"
        "from instar.runner.wasm import find_wasmtime\n"
        "try:\n    find_wasmtime()\n"
        "except InstarError as error:\n    print(error.code, error.text)\n"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT / "node" / "src")]
    done = subprocess.run(
        command, env={"INSTAR_WASMTIME": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("no-wasmtime "), done
    assert "pip install wasmtime" in done.stdout
    (tmp_path / "wasmtime.py").write_text("raise OSError('cannot open shared object')")
    done = subprocess.run(
        command, env={"INSTAR_WASMTIME": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert "cannot open shared object" in done.stdout, done


# --- services

SERVICE = """
static int64_t count;
static int32_t start(const struct instar_host *host)
{
    char state[64];
    if (instar_load(host, state, sizeof state) > 0)
        count = state[9] - '0';  /* {"count":N} */
    return 0;
}
static double step(const struct instar_host *host) { (void)host; count++; return -1; }
static int32_t request(const struct instar_host *host)
{
    char state[] = "{\\"count\\":0}";
    if (instar_get_bool(host, "trap", 0))
        __builtin_trap();
    state[9] = (char)('0' + count);
    instar_put_int(host, "kept", instar_save(host, state));
    return instar_put_int(host, "count", count);
}
static int32_t ready(const struct instar_host *host) { (void)host; return 1; }
static const char *health(const struct instar_host *host) { (void)host; return count > 5 ? "too many" : ""; }
INSTAR_SERVICE("test.wasm", "1.0.0", start, step, request, ready, 0, health);
"""


def question(child: Child, number: int, **args: Any) -> dict[str, Any]:
    child.say({"do": "request", "id": f"q{number}", "args": args})
    return child.until("answer", f"q{number}")


def test_a_service_from_start_to_stop_and_its_state_in_the_next(
    runner: Runner, make: Make, tmp_path: Path
) -> None:
    module = make(SERVICE, mode="service", stateful=True)
    for round_ in (1, 2):
        child = runner.serve(module, tmp_path / "data")
        child.until("state", "ready")
        assert question(child, 1)["reply"] == {"kept": 0, "count": round_}
        child.say({"do": "stop"})
        child.until("stopping", "ready")
        assert child.finish().exit_code == 0


def test_a_service_that_trapped_answers_and_ends(runner: Runner, make: Make, tmp_path: Path) -> None:
    """Its memory is in no known state: it is not entered again, and the agent starts a new one."""
    child = runner.serve(make(SERVICE, mode="service", stateful=True), tmp_path / "data")
    child.until("state", "ready")
    assert question(child, 1, trap=True)["error"]["code"] == "wasm-trap"
    end = child.finish()
    assert (end.code, end.exit_code, end.signal) == ("wasm-trap", 1, 0)
    assert "trap" in end.said("text")[-1]


def test_as_another_user(runner: Runner, make: Make) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    look = [sys.executable, "-c", "import platform, wasmtime"]
    try:
        subprocess.run(look, user="nobody", capture_output=True, timeout=60, cwd="/", check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this Python or its packages cannot be read by other users")
    assert runner.run(make(oneshot('return instar_put_int(host, "n", 1);')), user="nobody").reply == {"n": 1}
