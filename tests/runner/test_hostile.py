"""Modules that break, lie or attack: each a real compiled one in a real runner process.

What must come of each is a line with a code, or an exit status or signal, and never more than this one process:
that is what the agent makes a result of. What only the agent can bound (the number of processes of root, the
deadline of one that blocks its signals) is tested there.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from instar.core.errors import InputError
from instar.runner import elf
from instar_lab import machine
from tests.runner.compilers import compiled, need, need_wasm, wasm
from tests.runner.compilers import native as compile_native
from tests.runner.conftest import End, MakeModule, Runner, ask

INCLUDES = """
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
"""
Make = Any


@pytest.fixture
def make(make_module: MakeModule) -> Make:
    """make(source) -> a native module `test.native`."""

    def build(source: str, **more: Any) -> dict[str, Any]:
        return make_module(
            "test.native", {"m.so": compile_native(source, "-std=gnu99", "-w", "-O0")}, runs="native", **more
        )

    return build


@pytest.fixture
def make_wasm(make_module: MakeModule) -> Make:
    """make_wasm(source, *flags) -> a wasm module `test.native`."""

    def build(source: str, *flags: str) -> dict[str, Any]:
        return make_module("test.native", {"m.wasm": wasm(source, *flags)}, runs="wasm")

    return build


def oneshot(body: str, before: str = "") -> str:
    """C source of a one-shot module whose `run` has this body."""
    return (
        f"{before}\nstatic int32_t run(const struct instar_host *host)\n{{\n(void)host;\n{body}\n}}\n"
        'INSTAR_ONESHOT("test.native", "1.0.0", run);\n'
    )


def attack(body: str, before: str = "") -> str:
    """As `oneshot`, with what an attack needs from C's library."""
    return INCLUDES + oneshot(body, before)


# --- it ends itself


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ("volatile int *nowhere = 0; *nowhere = 1; return 0;", signal.SIGSEGV),
        ("abort();", signal.SIGABRT),
        ("char *block = malloc(40); free(block); free(block); free(block); return 0;", signal.SIGABRT),
        ("kill(0, SIGKILL); return 0;", signal.SIGKILL),
        ("volatile int zero = 0; return 7 / zero;", signal.SIGFPE),
        ("raise(SIGSTOP + 1); kill(getpid(), SIGTERM); return 0;", signal.SIGTERM),
    ],
    ids=["segfault", "abort", "double-free", "kills-its-group", "division", "terminates"],
)
def test_a_signal_ends_it_and_only_it(runner: Runner, make: Make, body: str, number: int) -> None:
    if "free(" in body and "x86_64" not in os.uname().machine and "aarch64" not in os.uname().machine:
        pytest.skip("what a double free does hangs on the C library")
    end = runner.run(make(attack(f'fputs("last words\\n", stderr); {body}')))
    assert (end.signal, end.answer) == (number, {}), end
    assert "last words" in end.stderr


def test_a_stack_that_overflows(runner: Runner, make: Make) -> None:
    deeper = """
static int deeper(volatile char *above)
{
    volatile char here[4096];
    here[0] = above[0];
    return above[0] == 42 ? 0 : deeper(here) + here[1];
}"""
    end = runner.run(make(attack("volatile char top[1] = {0}; return deeper(top);", deeper)))
    assert (end.signal, end.answer) == (signal.SIGSEGV, {})


def test_a_signal_in_a_warm_runner_ends_only_that_run(runner: Runner, make: Make) -> None:
    server = runner.warm()
    for body, number in (("abort();", signal.SIGABRT), ("kill(0, SIGKILL); return 0;", signal.SIGKILL)):
        assert server.run(make(attack(body), version=f"1.0.{number}")).signal == number
    good = make(oneshot('return instar_put_int(host, "n", 1);'), version="2.0.0")
    assert server.run(good).reply == {"n": 1}


@pytest.mark.parametrize("body", ["exit(0);", "_exit(0);", "pthread_exit(0);"])
def test_exit_0_without_a_reply_is_no_reply(runner: Runner, make: Make, body: str) -> None:
    endless = body.startswith("pthread")
    end = runner.start(ask(make(attack(body)), seconds=1.0 if endless else 60.0)).finish()
    assert end.answer == {}
    if not endless:
        assert (end.exit_code, end.signal) == (0, 0)


# --- it does not end


def test_a_hang_is_ended_by_its_alarm(runner: Runner, make: Make) -> None:
    """The agent's own deadline comes first; this is for a runner whose agent has died."""
    begun = time.monotonic()
    end = runner.start(ask(make(oneshot("for (volatile int i = 0;; i++) { }")), seconds=0.5)).finish()
    assert (end.signal, end.answer) == (signal.SIGALRM, {})
    assert time.monotonic() - begun > 1.0


def test_a_hang_that_blocks_every_signal_can_be_killed(runner: Runner, make: Make) -> None:
    body = """
        sigset_t all;
        sigfillset(&all);
        sigprocmask(SIG_BLOCK, &all, 0);
        instar_log(host, "blocked");
        for (;;)
            pause();"""
    child = runner.start(ask(make(attack(body))))
    child.until("log", "blocked")
    child.kill()
    assert child.finish().signal == signal.SIGKILL


def test_log_lines_without_end_are_cut_off(runner: Runner, make: Make) -> None:
    module = make(oneshot('for (;;) instar_log(host, "again and again and again");'))
    end = runner.start(ask(module, output=100_000)).finish()
    assert end.code == "too-much-output"
    assert (end.signal, end.exit_code) == (0, 1)
    assert len(end.raw) < 110_000


def test_errors_without_end_reach_nobody_but_their_tail(runner: Runner, make: Make) -> None:
    module = make(attack('for (;;) fputs("the same words\\n", stderr);'))
    end = runner.start(ask(module, seconds=0.5)).finish()
    assert (end.signal, end.answer) == (signal.SIGALRM, {})
    assert "the same words" in end.stderr


# --- it wants too much


# Until its exec, a child counts what this process holds as its own peak.
OURS = 0


@pytest.fixture(autouse=True)
def _own_peak() -> None:
    global OURS
    OURS = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_memory_has_a_bound(runner: Runner, make: Make) -> None:
    body = """
        int64_t blocks = 0;
        for (char *block; (block = malloc(1 << 20)); blocks++)
            memset(block, 1, 1 << 20);
        instar_put_int(host, "blocks", blocks);
        return blocks < 16 ? instar_fail(host, "too few") : 0;"""
    end = runner.run(make(attack(body)), memory=64 << 20)
    assert end.answer, end
    assert end.max_rss < OURS + (160 << 20)
    assert end.code in ("", "out-of-memory")
    if end.code == "":
        assert 16 <= end.reply["blocks"] <= 64


def test_memory_that_a_module_takes_unasked_ends_it(runner: Runner, make: Make) -> None:
    body = "for (;;) memset(malloc(1 << 20), 1, 1 << 20);"
    end = runner.run(make(attack(body)), memory=64 << 20)
    assert (end.signal, end.answer) == (signal.SIGSEGV, {})
    assert end.max_rss < OURS + (160 << 20)


def test_a_fork_bomb_of_another_user_has_a_bound(runner: Runner, make: Make) -> None:
    """As root nothing of the kernel but a cgroup counts processes: there the agent's watch does."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    body = 'int64_t n = 0; for (;; n++) if (fork() < 0) break; return instar_put_int(host, "n", n);'
    child = runner.start(ask(make(attack(body)), user="nobody", seconds=20.0, processes=20))
    end = child.finish()
    machine.wait_for(lambda: not alive(child.pid), "the end of all", 60.0, lambda: f"{alive(child.pid)}")
    assert end.reply["n"] <= 20


def alive(group: int) -> list[int]:
    """Processes of a group that have not ended; others on this machine may be nobody's, too."""
    left = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            state, _, pgrp = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            left.append(int(name))
    return left


def test_a_file_has_a_bound(runner: Runner, make: Make) -> None:
    body = """
        static char block[1 << 16];
        FILE *file = fopen("large", "w");
        while (file && fwrite(block, sizeof block, 1, file) == 1) { }
        return instar_put_int(host, "error", errno);"""
    end = runner.run(make(attack(body)), disk=1 << 20)
    assert end.reply == {"error": errno.EFBIG}
    assert (runner.cwd / "large").stat().st_size <= 1 << 20


# --- it reaches for what is the runner's


def test_all_descriptors_closed(runner: Runner, make: Make) -> None:
    end = runner.run(make(attack("for (int fd = 0; fd < 1024; fd++) close(fd); return 0;")))
    assert end.answer == {}
    assert (end.signal, end.exit_code) == (0, 1)


def test_another_file_in_the_place_of_the_control_line(runner: Runner, make: Make) -> None:
    body = 'FILE *file = fopen("mine", "w"); dup2(fileno(file), 3); return instar_put_int(host, "n", 1);'
    end = runner.run(make(attack(body)))
    assert end.answer == {}
    assert end.exit_code == 1
    assert "control line" in end.stderr
    assert (runner.cwd / "mine").read_bytes() == b""


def test_noise_on_the_control_line_is_the_agents_to_judge(runner: Runner, make: Make) -> None:
    """It can say there what it likes: it is the only one that it harms."""
    end = runner.run(make(attack('return write(3, "{\\"log\\":1}\\n", 10) == 10 ? 0 : 1;')))
    assert end.lines[0] == {"log": 1}
    assert end.reply == {}


# --- what cannot be loaded


def test_no_elf_another_type_of_elf_and_a_cut_one(runner: Runner, make_module: MakeModule) -> None:
    need("cc")
    whole = compile_native(oneshot("return 0;"))
    program = compiled(["cc", "-no-pie"], ".c", "int main(void) { return 0; }")
    for content in (b"", b"#!/bin/sh\n", b"\x7fELF", whole[:40], whole[:5000], program, os.urandom(3000)):
        end = runner.run(make_module("test.native", {"m.so": content}, runs="native"))
        assert (end.code, end.signal) == ("not-loadable", 0), (len(content), end)


def test_a_library_for_another_machine(runner: Runner, make_module: MakeModule) -> None:
    whole = bytearray(compile_native(oneshot("return 0;")))
    other = 183 if whole[18] != 183 else 62
    whole[18:20] = other.to_bytes(2, "little" if whole[5] == 1 else "big")
    end = runner.run(make_module("test.native", {"m.so": bytes(whole)}, runs="native"))
    assert end.code == "wrong-machine"
    assert elf.MACHINES[other] in end.answer["error"]["text"]


def test_another_byte_order_is_another_machine(tmp_path: Path) -> None:
    file = tmp_path / "big.so"
    head = bytearray(64)
    head[:6] = b"\x7fELF\x02\x02"
    head[16:20] = (3).to_bytes(2, "big") + (62).to_bytes(2, "big")
    head[32:40] = (64).to_bytes(8, "big")  # where its one segment is described
    head[54:58] = (56).to_bytes(2, "big") + (1).to_bytes(2, "big")
    file.write_bytes(bytes(head) + bytes(56))
    with pytest.raises(InputError) as caught:
        elf.check_library(str(file))
    assert caught.value.code == "wrong-machine"


def test_a_library_that_needs_what_is_not_there(runner: Runner, make: Make) -> None:
    end = runner.run(
        make(oneshot("return nowhere_to_be_found();", "extern int32_t nowhere_to_be_found(void);"))
    )
    assert end.code == "not-loadable"
    assert "nowhere_to_be_found" in end.answer["error"]["text"]


DESCRIBED = """
static int32_t run(const struct instar_host *host) { (void)host; return 0; }
const struct instar_module instar_module_v1 = { %s, "%s", "1.0.0", %s, 0, 0, 0, 0, 0, 0 };
"""


@pytest.mark.parametrize(
    ("head", "name", "function", "code"),
    [
        ("0x12345678, 1, sizeof(struct instar_module), 0", "test.native", "run", "wrong-magic"),
        ("INSTAR_MODULE_MAGIC, 2, sizeof(struct instar_module), 0", "test.native", "run", "wrong-abi"),
        ("INSTAR_MODULE_MAGIC, 1, 24, 0", "test.native", "run", "wrong-abi"),
        ("INSTAR_MODULE_MAGIC, 1, sizeof(struct instar_module), 0", "other.name", "run", "not-loadable"),
        ("INSTAR_MODULE_MAGIC, 1, sizeof(struct instar_module), 0", "test.native", "0", "no-symbol"),
        (
            "INSTAR_MODULE_MAGIC, 1, sizeof(struct instar_module) + 64, 0",
            "test.native",
            "run",
            "",
        ),  # a later one
    ],
)
def test_what_the_descriptor_must_say(
    runner: Runner, make: Make, head: str, name: str, function: str, code: str
) -> None:
    unused = "" if function == "run" else "\nint instar_unused(void) { return run(0); }"
    end = runner.run(make(DESCRIBED % (head, name, function) + unused))
    assert end.code == code, end


def test_a_library_without_the_symbol(runner: Runner, make: Make) -> None:
    assert runner.run(make("int something_else = 1;")).code == "no-symbol"


def test_a_service_cannot_be_run_as_a_oneshot_nor_the_other_way(
    runner: Runner, make: Make, make_module: MakeModule
) -> None:
    module = make(oneshot("return 0;"))
    end = runner.serve({**module, "mode": "service"}, Path(module["folder"]).parent / "data").finish()
    assert end.code == "no-symbol"
    assert "start" in end.lines[-1]["error"]["text"]


# --- WebAssembly


def ended(end: End) -> tuple[str, int, int]:
    return end.code, end.exit_code and 1, end.signal


def test_wasm_that_traps(runner: Runner, make_wasm: Make) -> None:
    end = runner.run(make_wasm(oneshot("__builtin_trap();")))
    assert ended(end) == ("wasm-trap", 1, 0)
    assert "unreachable" in end.answer["error"]["text"]
    assert "backtrace" in end.stderr


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("volatile int32_t zero = 0; return 7 / zero;", "divide by zero"),
        ("return *(volatile int32_t *)0x7ffffff0;", "out of bounds"),
    ],
)
def test_wasm_that_divides_by_nothing_or_reads_elsewhere(
    runner: Runner, make_wasm: Make, body: str, words: str
) -> None:
    end = runner.run(make_wasm(oneshot(body)))
    assert end.code == "wasm-trap"
    assert words in end.answer["error"]["text"]


def test_wasm_that_recurses_without_end(runner: Runner, make_wasm: Make) -> None:
    deeper = "static int deeper(volatile int n) { return n == -1 ? 0 : deeper(n + 1) + n; }"
    end = runner.run(make_wasm(oneshot("return deeper(0);", deeper), "-Wl,-z,stack-size=1048576"))
    assert end.code == "wasm-trap"


def test_wasm_that_never_returns(runner: Runner, make_wasm: Make) -> None:
    end = runner.run(make_wasm(oneshot("for (volatile int i = 0;; i++) { }")), seconds=0.5)
    assert ended(end) == ("wasm-trap", 1, 0)
    assert "interrupted after 0.5 s" in end.answer["error"]["text"]


def test_wasm_that_talks_without_end(runner: Runner, make_wasm: Make) -> None:
    module = make_wasm(oneshot('for (;;) instar_log(host, "again and again and again");'))
    end = runner.start(ask(module, output=100_000)).finish()
    assert ended(end) == ("too-much-output", 1, 0)
    assert len(end.raw) < 110_000


def test_wasm_that_grows_without_end(runner: Runner, make_wasm: Make) -> None:
    body = """
        while (__builtin_wasm_memory_grow(0, 16) != (size_t)-1) { }
        return instar_put_int(host, "pages", (int64_t)__builtin_wasm_memory_size(0));"""
    end = runner.run(make_wasm(oneshot(body)), memory=64 << 20)
    assert 200 <= end.reply["pages"] <= 1024  # its engine needs some of it


def test_wasm_that_begins_too_large(runner: Runner, make_wasm: Make) -> None:
    end = runner.run(make_wasm(oneshot("return 0;"), "-Wl,--initial-memory=134217728"), memory=64 << 20)
    assert end.code == "not-loadable"
    assert "limits" in end.answer["error"]["text"]


FOREIGN = '__attribute__((import_module("%s"), import_name("%s"))) extern %s;'


@pytest.mark.parametrize(
    ("module", "name", "declared", "call", "code"),
    [
        ("env", "system", "int32_t f(int32_t a)", "f(1)", "no-symbol"),
        ("wasi_snapshot_preview1", "proc_exit", "void f(int32_t a)", "(f(1), 0)", "no-symbol"),
        ("instar", "spawn", "int32_t f(int32_t a)", "f(1)", "no-symbol"),
        ("instar", "put_int", "int32_t f(int32_t a)", "f(1)", "wrong-abi"),
    ],
)
def test_wasm_that_imports_what_there_is_not(
    runner: Runner, make_wasm: Make, module: str, name: str, declared: str, call: str, code: str
) -> None:
    end = runner.run(make_wasm(oneshot(f"return {call};", FOREIGN % (module, name, declared))))
    assert end.code == code
    assert f"{module}.{name}" in end.answer["error"]["text"]


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("int nothing = 1;\n", "no-symbol"),
        (oneshot("return 0;", "#undef INSTAR_MODULE_MAGIC\n#define INSTAR_MODULE_MAGIC 7"), "wrong-magic"),
        (oneshot("return 0;", "#undef INSTAR_ABI\n#define INSTAR_ABI 2"), "wrong-abi"),
        (oneshot("return 0;").replace("test.native", "another"), "not-loadable"),
    ],
)
def test_wasm_whose_exports_are_wrong(runner: Runner, make_wasm: Make, source: str, code: str) -> None:
    assert runner.run(make_wasm(source)).code == code


def test_what_is_no_wasm_at_all(runner: Runner, make_module: MakeModule) -> None:
    whole = wasm(oneshot("return 0;"))
    for content in (b"", b"\0asm", b"\0asm\x0d\0\1\0", whole[:-20], whole[:8] + os.urandom(500), b"(module)"):
        end = runner.run(make_module("test.native", {"m.wasm": content}, runs="wasm"))
        assert ended(end) == ("not-loadable", 1, 0), content[:20]


STARTS_WITH_A_HANG = bytes.fromhex(
    "0061736d01000000"  # header
    "010401600000"  # one type: no arguments, no results
    "03020100"  # one function of that type
    "080100"  # which is the start function
    "0a0901070003400c000b0b"  # loop br 0 end
)


def test_wasm_that_hangs_before_it_is_asked_anything(runner: Runner, make_module: MakeModule) -> None:
    need_wasm()
    module = make_module("test.native", {"m.wasm": STARTS_WITH_A_HANG}, runs="wasm")
    assert runner.run(module, seconds=0.5).code == "wasm-trap"
