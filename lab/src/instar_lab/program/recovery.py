"""Build `instar-recovery.pyz`, the recovery core: only what its entry and the `verify` child reach.

Found by following imports, those inside functions too; those under `if TYPE_CHECKING:` are not made by
anybody. The rules of `build` hold: the same source gives the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping

from instar_lab.program import build

ROOTS = ("instar.rescue.main", "instar.oneshot.verify")

MAIN = """\
import sys

from instar.rescue.main import main

sys.exit(main(sys.argv[1:]))
"""


def build_core(version: str, *, built: str | None = None) -> build.Program:
    """Build the recovery core as `version`. Raises InputError as `build.build` does."""
    build.check_version(version)
    sources = build.package_sources("instar")
    sources["instar/version.py"] = build.version_file(version, built)
    for library in build.LIBRARIES:
        sources |= build.package_sources(library)
    kept = {name: sources[name] for name in reached(sources, ROOTS)}
    kept["__main__.py"] = MAIN.encode()
    files = dict(kept)
    for name, source in kept.items():
        files[f"{name}c"] = build.compiled(source, name)
    for library in build.LIBRARIES:
        files |= build.licences(library)
    data = build.pack(files)
    return build.Program(version, data, hashlib.sha384(data[:-2]).hexdigest())


def reached(sources: Mapping[str, bytes], roots: tuple[str, ...]) -> set[str]:
    """The files of `sources` that importing `roots`, and calling whatever is in them, can import."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        file = file_of(module, sources)
        if file is None or file in found:
            continue
        found.add(file)
        if "." in module:
            waiting.append(module.rpartition(".")[0])
        package = module if file.endswith("/__init__.py") else module.rpartition(".")[0]
        waiting += imported(ast.parse(sources[file]), package)
    return found


def file_of(module: str, sources: Mapping[str, bytes]) -> str | None:
    """The file of `module` among `sources`; None for one that is not of ours, such as the standard library's."""
    path = module.replace(".", "/")
    return next((name for name in (f"{path}/__init__.py", f"{path}.py") if name in sources), None)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every name that may be a module: `from a import b` gives a and a.b. `package` is for relative imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _only_for_types(node.test):
            yield from imported(ast.Module(node.orelse, []), package)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node, package)


def _only_for_types(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else test.id if isinstance(test, ast.Name) else ""
    return name == "TYPE_CHECKING"
