"""sdk/instar_module.h: the runner's tables say what it says, and each language that it is for compiles with it."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from instar.runner import native, wrong
from instar.runner.adapt import FUNCTIONS
from tests.runner.compilers import HEADER, SDK, SHARED, STRICT, compiled, need
from tests.runner.conftest import MakeModule, Runner

HEADER_TEXT = (SDK / "instar_module.h").read_text()


def oneshot(body: str) -> str:
    """C source of a one-shot module whose `run` has this body."""
    return (
        f"static int32_t run(const struct instar_host *host)\n{{\n(void)host;\n{body}\n}}\n"
        'INSTAR_ONESHOT("test.native", "1.0.0", run);\n'
    )


def test_the_structs_are_as_the_c_compiler_lays_them_out(tmp_path: Path) -> None:
    need("cc")
    lines = []
    for name, struct in (("instar_host", native.HostStruct), ("instar_module", native.ModuleStruct)):
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        for member, *_ in struct._fields_:
            lines.append(f'printf("{name}.{member} %zu\\n", offsetof(struct {name}, {member}));')
    program = tmp_path / "layout"
    program.write_bytes(
        compiled(
            ["cc", *STRICT],
            ".c",
            f"{HEADER}#include <stdio.h>\nint main(void) {{ {' '.join(lines)} return 0; }}",
        )
    )
    program.chmod(0o755)
    said = dict(line.rsplit(" ", 1) for line in subprocess.check_output([program], text=True).splitlines())
    for name, struct in (("instar_host", native.HostStruct), ("instar_module", native.ModuleStruct)):
        assert int(said[name]) == ctypes.sizeof(struct)
        for member, *_ in struct._fields_:
            assert int(said[f"{name}.{member}"]) == getattr(struct, member).offset, member


def test_the_table_of_functions_is_the_headers() -> None:
    struct = HEADER_TEXT[
        HEADER_TEXT.index("struct instar_host {") : HEADER_TEXT.index("#define INSTAR_HAS(host, member) \\")
    ]
    kinds = {"int32_t": "I", "int64_t": "L", "double": "D"}
    found = []
    for gives, name, takes in re.findall(r"^\s+(\w+) \(\*(\w+)\)\(void \*self(.*?)\);", struct, re.MULTILINE):
        text = re.sub(r", char \*out, uint32_t room", " O", takes)
        text = re.sub(r", void \*out, uint32_t room", " B", text)
        text = re.sub(r", const char \*\w+, uint32_t \w+", " T", text)
        for kind, letter in kinds.items():
            text = re.sub(rf", {kind} \w+", f" {letter}", text)
        found.append((name, text.replace(" ", ""), kinds[gives]))
    assert found == [(function.name, function.takes, function.gives) for function in FUNCTIONS]


def test_the_imports_for_wasm_are_the_same_functions() -> None:
    imports = re.findall(r"^INSTAR_IMPORT\((\w+), (\w+), \((.*)\)\);", HEADER_TEXT, re.MULTILINE)
    members = re.findall(r"^\s+(\w+) \(\*(\w+)\)\(void \*self(?:, )?(.*?)\);", HEADER_TEXT, re.MULTILINE)
    assert [
        (gives, name, takes.replace("void", "") if takes == "void" else takes)
        for gives, name, takes in imports
    ] == members


def test_the_numbers_are_the_headers() -> None:
    numbers = dict(re.findall(r"#define INSTAR_(\w+) \(?(-?\w+?)u?\)?(?:\s|$)", HEADER_TEXT))
    for name in ("OK", "ABSENT", "BAD_POINTER", "BAD_ORDER", "BAD_VALUE", "REFUSED", "FAILED", "TOO_LARGE"):
        assert int(numbers[name]) == getattr(wrong, name)
    assert int(numbers["ABI"]) == native.ABI
    assert int(numbers["MODULE_MAGIC"], 16) == native.MODULE_MAGIC
    assert int(numbers["HOST_MAGIC"], 16) == native.HOST_MAGIC


@pytest.mark.parametrize("standard", ["c99", "c11", "c17"])
def test_the_header_is_good_for_c(standard: str) -> None:
    need("cc")
    compiled(["cc", *STRICT, *SHARED, f"-std={standard}"], ".c", HEADER + oneshot("return 0;"))


def test_the_header_is_good_for_cpp(runner: Runner, make_module: MakeModule) -> None:
    need("c++", required=False)
    source = (
        HEADER
        + "#include <string>\n"
        + oneshot('std::string s("from C++");\nreturn instar_put_string(host, "said", s.c_str());')
    )
    flags = [flag for flag in STRICT if not flag.startswith("-std")]
    code = compiled(["c++", "-std=c++11", *flags, *SHARED], ".cpp", source)
    module = make_module("test.native", {"m.so": code}, runs="native")
    assert runner.run(module).reply == {"said": "from C++"}


RUST = """
use std::os::raw::{c_char, c_void};
type Call = Option<unsafe extern "C" fn(*const Host) -> i32>;
#[repr(C)] pub struct Host {
    magic: u32, abi: u32, size: u32, reserved: u32, self_: *mut c_void,
    before: [*const c_void; 8],
    key: unsafe extern "C" fn(*mut c_void, *const u8, u32) -> i32,
    skipped: [*const c_void; 4],
    put_string: unsafe extern "C" fn(*mut c_void, *const u8, u32) -> i32,
}
#[repr(C)] pub struct Module {
    magic: u32, abi: u32, size: u32, reserved: u32, name: *const c_char, version: *const c_char,
    run: Call, others: [*const c_void; 6],
}
unsafe impl Sync for Module {}
unsafe extern "C" fn run(host: *const Host) -> i32 {
    let (h, said) = (&*host, "from Rust");
    (h.key)(h.self_, "said".as_ptr(), 4);
    (h.put_string)(h.self_, said.as_ptr(), said.len() as u32)
}
#[no_mangle] pub static instar_module_v1: Module = Module {
    magic: 0x494E5354, abi: 1, size: std::mem::size_of::<Module>() as u32, reserved: 0,
    name: b"test.native\\0".as_ptr() as *const c_char, version: b"1.0.0\\0".as_ptr() as *const c_char,
    run: Some(run), others: [std::ptr::null(); 6],
};
"""


def test_the_header_is_good_for_rust(runner: Runner, make_module: MakeModule) -> None:
    need("rustc", required=False)
    code = compiled(["rustc", "--crate-type=cdylib", "-Aall"], ".rs", RUST)
    module = make_module("test.native", {"m.so": code}, runs="native")
    assert runner.run(module).reply == {"said": "from Rust"}
