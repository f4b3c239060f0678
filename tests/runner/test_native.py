"""Native modules through real runner processes: the host's functions, mistakes, services, files.

The header itself is in test_header.py; what cannot be loaded, and what harms itself, in test_hostile.py.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from instar.runner import wrong
from instar.runner.landlock import version
from tests.runner.compilers import native as compile_native
from tests.runner.conftest import Child, MakeModule, Runner

Make = Any


@pytest.fixture
def make(make_module: MakeModule) -> Make:
    """make(body) -> a native module `test.native` whose C source is `body`."""

    def build(
        body: str, mode: str = "oneshot", stateful: bool = False, flags: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        code = compile_native(body, *flags)
        return make_module("test.native", {"m.so": code}, runs="native", mode=mode, stateful=stateful)

    return build


def oneshot(body: str, before: str = "") -> str:
    """C source of a one-shot module whose `run` has this body."""
    return (
        f"{before}\nstatic int32_t run(const struct instar_host *host)\n{{\n(void)host;\n{body}\n}}\n"
        'INSTAR_ONESHOT("test.native", "1.0.0", run);\n'
    )


# --- one run


def test_arguments_in_and_a_reply_out(runner: Runner, make: Make) -> None:
    module = make(
        oneshot("""
        char text[64];
        int32_t length = instar_get_text(host, "who", text, sizeof text);
        instar_put_string(host, "who", text);
        instar_put_int(host, "length", length);
        instar_put_int(host, "big", instar_get_int(host, "big", 0));
        instar_put_int(host, "none", instar_get_int(host, "none", -7));
        instar_put_double(host, "half", instar_get_double(host, "half", 0) / 2);
        instar_put_bool(host, "yes", instar_get_bool(host, "yes", 0));
        instar_put_int(host, "items", instar_count(host, "list"));
        instar_put_int(host, "second", instar_get_int(host, "/list/1", 0));
        instar_get_text(host, "/deep/a~1b/0", text, sizeof text);
        instar_put_string(host, "deep", text);
        instar_get_text(host, "list", text, sizeof text);
        instar_put_string(host, "as json", text);
        instar_text(host, "one ");
        instar_key(host, "nested");
        instar_begin_object(host);
          instar_text(host, "two");
          instar_key(host, "list");
          instar_begin_list(host);
            instar_null(host);
            instar_json(host, "{\\"own\\": [1, 2]}");
            instar_begin_list(host);
            instar_end_list(host);
          instar_end_list(host);
        instar_end_object(host);
        return INSTAR_OK;""")
    )
    args = {"who": "Zoë", "big": 2**63 - 1, "half": 3, "yes": True, "list": [1, 22], "deep": {"a/b": ["x"]}}
    assert runner.run(module, args).reply == {
        "who": "Zoë", "length": 4, "big": 2**63 - 1, "none": -7, "half": 1.5, "yes": True, "items": 2, "second": 22,
        "deep": "x", "as json": "[1,22]", "nested": {"list": [None, {"own": [1, 2]}, []]}, "text": "one two",
    }  # fmt: skip


def test_all_arguments_as_json_and_what_each_is(runner: Runner, make: Make) -> None:
    module = make(
        oneshot("""
        char all[256], key[2] = "a";
        instar_args(host, all, sizeof all);
        instar_key(host, "all");
        instar_json(host, all);
        instar_key(host, "kinds");
        instar_begin_list(host);
        for (; key[0] <= 'h'; key[0]++)
            instar_int(host, instar_kind(host, key));
        instar_end_list(host);
        return 0;""")
    )
    args = {"a": None, "b": True, "c": 1, "d": 1.5, "e": "x", "f": [], "g": {}}
    assert runner.run(module, args).reply == {"all": args, "kinds": [0, 1, 2, 3, 4, 5, 6, -1]}


def test_a_text_that_does_not_fit_is_cut_between_characters(runner: Runner, make: Make) -> None:
    module = make(
        oneshot("""
        char small[5] = "....";
        instar_put_int(host, "length", instar_get_text(host, "t", small, sizeof small));
        instar_put_string(host, "cut", small);
        instar_put_int(host, "without room", instar_get_text(host, "t", 0, 0));
        return 0;""")
    )
    assert runner.run(module, {"t": "aööö"}).reply == {"length": 7, "cut": "aö", "without room": 7}


def test_what_it_says_while_it_runs(runner: Runner, make: Make) -> None:
    module = make(
        oneshot("""
        instar_progress(host, 0.5, "half");
        instar_log(host, "not \\xff UTF-8");
        return 0;""")
    )
    end = runner.run(module)
    assert end.lines[0] == {"progress": 0.5, "text": "half"}
    assert end.said("log") == ["not \ufffd UTF-8"]
    assert end.reply == {}


def test_it_fails_with_its_own_words_or_its_number(runner: Runner, make: Make) -> None:
    end = runner.run(
        make(oneshot('return instar_fail(host, "cannot find the moon: expected one, got none");'))
    )
    assert (end.code, end.answer["error"]["text"]) == (
        "module-failed",
        "cannot find the moon: expected one, got none",
    )
    assert end.exit_code != 0
    end = runner.run(make(oneshot("return 42;")))
    assert end.code == "module-failed"
    assert "got 42" in end.answer["error"]["text"]


# --- mistakes


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("instar_int(host, 1);", "expected a key, got a value"),
        ('instar_key(host, "a"); instar_key(host, "b");', "expected a value for the key 'a'"),
        ('instar_key(host, "a");', "expected a value for the key 'a', got the end of the call"),
        ('instar_key(host, "a"); instar_begin_list(host);', "expected the end of a list"),
        ("instar_end_object(host);", "expected a begin before it"),
        (
            'instar_key(host, "a"); instar_begin_list(host); instar_end_object(host);',
            "expected the end of a list",
        ),
        (
            'instar_key(host, "a"); instar_begin_list(host); instar_key(host, "b");',
            "expected a value of the list",
        ),
        ('instar_key(host, "a"); instar_json(host, "{nonsense");', "expected JSON"),
        ('instar_key(host, "a"); instar_json(host, "NaN");', "expected JSON"),
        ('instar_put_double(host, "a", 1e308 * 10);', "expected a finite number"),
        ('for (int i = 0; i < 40; i++) { instar_key(host, "a"); instar_begin_object(host); }', "levels"),
        ('for (int i = 0; i < 300000; i++) instar_text(host, "a");', "bytes"),
    ],
)
def test_a_reply_that_would_be_no_json_is_refused(runner: Runner, make: Make, body: str, words: str) -> None:
    end = runner.run(make(oneshot(f"{body}\nreturn INSTAR_OK;")))
    assert end.code == "bad-reply"
    assert words in end.answer["error"]["text"]


@pytest.mark.parametrize(
    "body",
    [
        "instar_string_n(host, (const char *)8, 4)",
        "instar_string_n(host, 0, 4)",
        'instar_string_n(host, "short", 2000000000)',
        "host->log(host->self, (const char *)(uintptr_t)0xdeadbeef000, 10)",
        "instar_args(host, (char *)16, 100)",
        'instar_file_read(host, "/etc/hostname", 0, (void *)1, 10)',
        'instar_get_text(host, "absent", (char *)(uintptr_t)-1, 10)',
    ],
)
def test_a_pointer_that_leads_nowhere_is_an_error_and_no_crash(runner: Runner, make: Make, body: str) -> None:
    end = runner.run(
        make(oneshot(f'instar_key(host, "k"); (void){body}; return INSTAR_OK;')),
        touches={"read": ["/etc/hostname"]},
    )
    assert end.signal == 0
    assert end.code == "module-failed"
    assert "cannot" in end.answer["error"]["text"]


def test_an_argument_of_another_type_is_named(runner: Runner, make: Make) -> None:
    end = runner.run(
        make(oneshot('return instar_put_int(host, "n", instar_get_int(host, "n", 3));')), {"n": "five"}
    )
    assert end.code == "bad-job"
    assert "argument 'n': expected a whole number" in end.answer["error"]["text"]


def test_the_first_mistake_counts_and_the_rest_still_answers(runner: Runner, make: Make) -> None:
    end = runner.run(make(oneshot('instar_end_list(host); return instar_fail(host, "because of it");')))
    assert end.code == "bad-reply"
    assert "end_list" in end.answer["error"]["text"]


# --- services

SERVICE = """
static int64_t count;
static int busy;
static int32_t start(const struct instar_host *host)
{
    char state[128];
    int32_t length = instar_load(host, state, sizeof state);
    if (length > 0)
        count = state[9] - '0';  /* {"count":N} */
    instar_log(host, length > 0 ? "found" : "new");
    return 0;
}
static double step(const struct instar_host *host) { (void)host; count++; return -1; }
static int32_t request(const struct instar_host *host)
{
    char state[] = "{\\"count\\":0}";
    if (instar_get_bool(host, "busy", 0))
        busy = 1;
    if (instar_get_bool(host, "fail", 0))
        return instar_fail(host, "asked to");
    if (instar_get_bool(host, "keep", 0)) {
        state[9] = (char)('0' + count);
        instar_put_int(host, "kept", instar_save(host, state));
    }
    return instar_put_int(host, "count", count);
}
static int32_t ready(const struct instar_host *host) { instar_log(host, "asked"); return busy == 0 || busy++ > 3; }
static void stop(const struct instar_host *host) { instar_log(host, "stopped"); }
static const char *health(const struct instar_host *host) { (void)host; return busy ? "under load" : ""; }
INSTAR_SERVICE("test.native", "1.0.0", start, step, request, ready, stop, health);
"""


def question(child: Child, number: int, **args: Any) -> dict[str, Any]:
    child.say({"do": "request", "id": f"q{number}", "args": args})
    return child.until("answer", f"q{number}")


def test_a_service_from_start_to_stop_and_its_state_in_the_next(
    runner: Runner, make: Make, tmp_path: Path
) -> None:
    module = make(SERVICE, mode="service", stateful=True)
    child = runner.serve(module, tmp_path / "data")
    child.until("state", "ready")
    answer = question(child, 1, keep=True)
    assert (answer["ok"], answer["reply"]) == (True, {"kept": 0, "count": 1})
    failed = question(child, 2, fail=True)
    assert (failed["ok"], failed["error"]) == (False, {"code": "module-failed", "text": "asked to"})
    question(child, 3, busy=True)
    assert child.until("state", "failed")["text"] == "under load"
    child.say({"do": "stop"})
    child.until("stopping", "ready")
    end = child.finish()
    assert end.exit_code == 0
    assert end.said("log").count("asked") >= 3
    assert end.said("log")[0] == "new"
    assert end.said("log")[-1] == "stopped"

    again = runner.serve(module, tmp_path / "data")
    again.until("state", "ready")
    assert question(again, 1)["reply"] == {"count": 2}
    assert json.loads((tmp_path / "data" / "state.json").read_text()) == {"count": 1}


def test_state_is_for_modules_that_say_they_keep_one(runner: Runner, make: Make, tmp_path: Path) -> None:
    child = runner.serve(make(SERVICE, mode="service"), tmp_path / "data")
    child.until("state", "ready")
    assert question(child, 1, keep=True)["reply"] == {"kept": wrong.REFUSED, "count": 1}


def test_state_must_be_an_object(runner: Runner, make: Make, tmp_path: Path) -> None:
    source = SERVICE.replace('"{\\"count\\":0}"', '"[0,1,2,3,4]"')
    child = runner.serve(make(source, mode="service", stateful=True), tmp_path / "data")
    child.until("state", "ready")
    answer = question(child, 1, keep=True)
    assert answer["error"]["code"] == "bad-state"


# --- files

READS = """
    char text[200], path[300];
    instar_get_text(host, "path", path, sizeof path);
    int64_t n = instar_file_read(host, path, instar_get_int(host, "from", 0), text, sizeof text);
    instar_put_int(host, "n", n);
    instar_key(host, "text");
    instar_string_n(host, text, n > 0 ? (uint32_t)n : 0);
    n = instar_file_list(host, path, text, sizeof text);
    instar_put_int(host, "listed", n);
    if (n > 0 && n < 200) { instar_key(host, "list"); instar_json(host, text); }
    return 0;"""


def test_files_are_read_where_the_manifest_says(runner: Runner, make: Make, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "inside-not"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "file").write_text("hello")
    (inside / "out").symlink_to(outside / "file")
    (inside / "in").symlink_to("file")
    (outside / "way-in").symlink_to(inside / "file")
    os.mkfifo(inside / "pipe")
    module = make(oneshot(READS))

    def read(path: Path | str, start: int = 0) -> Any:
        end = runner.run(module, {"path": str(path), "from": start}, touches={"read": [str(inside)]})
        return end.reply

    assert read(inside / "file")["text"] == "hello"
    assert read(inside / "file", 3)["text"] == "lo"
    assert read(inside / "file", 99)["n"] == 0
    assert read(inside / "in")["text"] == "hello"
    assert read(outside / "way-in")["text"] == "hello"
    assert read(inside / "none")["n"] == wrong.ABSENT
    assert read(inside / "pipe")["n"] == wrong.FAILED
    for path in (
        outside / "file",
        inside / "out",
        f"{inside}/../inside-not/file",
        "relative",
        "",
        "/proc/self/root/etc/passwd",
    ):
        assert read(path)["n"] == wrong.REFUSED, path


def test_a_folder_is_listed(runner: Runner, make: Make, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a").write_text("12345")
    os.utime(inside / "a", (1000, 1000))
    (inside / "a").chmod(0o640)
    reply = runner.run(make(oneshot(READS)), {"path": str(inside)}, touches={"read": [str(inside)]}).reply
    assert reply["list"] == [{"name": "a", "kind": "file", "size": 5, "mode": 0o640, "mtime": 1000.0}]
    assert stat.S_IMODE((inside / "a").stat().st_mode) == 0o640


# --- Landlock

WRITES = """
    char path[300];
    FILE *file;
    instar_get_text(host, "path", path, sizeof path);
    file = fopen(path, "w");
    instar_put_int(host, "error", file ? 0 : errno);
    if (file) fclose(file);
    return 0;"""


def test_the_kernel_keeps_it_to_its_folders(runner: Runner, make: Make, tmp_path: Path) -> None:
    if not version():
        pytest.skip("this kernel has no Landlock")
    module = make(oneshot(WRITES, "#include <errno.h>\n#include <stdio.h>"))
    (tmp_path / "allowed").mkdir()
    (tmp_path / "forbidden").write_text("as it was")

    def write(path: Path | str) -> int:
        return int(
            runner.run(module, {"path": str(path)}, touches={"write": [str(tmp_path / "allowed")]}).reply[
                "error"
            ]
        )

    assert write(tmp_path / "allowed" / "file") == 0
    assert write(runner.cwd / "scratch") == 0
    assert write("/dev/null") == 0
    assert write(tmp_path / "forbidden") == errno.EACCES
    assert write(tmp_path / "new") == errno.EACCES
    assert (tmp_path / "forbidden").read_text() == "as it was"


CONNECTS = """
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return instar_put_int(host, "error", connect(fd, (struct sockaddr *)&to, sizeof to) ? errno : 0);"""


def test_the_kernel_keeps_it_off_tcp_unless_it_says_so(runner: Runner, make: Make) -> None:
    if version() < 4:
        pytest.skip("this kernel's Landlock knows no TCP")
    module = make(oneshot(CONNECTS, "#include <arpa/inet.h>\n#include <errno.h>\n#include <sys/socket.h>"))
    assert runner.run(module).reply == {"error": errno.EACCES}
    assert runner.run(module, touches={"network": True}).reply["error"] != errno.EACCES


def test_a_warm_runner_does_the_same(runner: Runner, make: Make) -> None:
    server = runner.warm()
    module = make(oneshot('return instar_put_int(host, "twice", 2 * instar_get_int(host, "n", 0));'))
    assert [server.run(module, {"n": n}).reply for n in (1, 2, 3)] == [
        {"twice": 2},
        {"twice": 4},
        {"twice": 6},
    ]


def test_a_child_that_it_forked_reads_its_own_memory(runner: Runner, make: Make) -> None:
    body = """
        char words[] = "parent";
        pid_t child = fork();
        if (child == 0) {
            words[0] = 'c';
            instar_log(host, words);
            _exit(0);
        }
        waitpid(child, 0, 0);
        instar_log(host, words);
        return 0;"""
    module = make(oneshot(body, "#include <sys/wait.h>\n#include <unistd.h>"))
    assert runner.run(module).said("log") == ["carent", "parent"]
