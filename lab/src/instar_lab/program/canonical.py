"""Compiled code as bytes that depend on the source and on Python's minor version alone.

`marshal.dumps` marks an object for later reference when something else in the process happens to hold it,
so two runs may write the same code in different bytes. Here its stream is read into a tree and written
again, with references placed by content: equal leaves and tuples share one copy, code objects do not.

The stream's format is that of CPython's Python/marshal.c (version 4), the same for 3.11 to 3.14.
"""

from __future__ import annotations

import importlib.util
import marshal
import struct
from collections import Counter
from dataclasses import dataclass
from types import CodeType

FLAG_REF = 0x80
SINGLETONS = b"NTFS."
SHORT_TEXT = b"zZ"  # ASCII of at most 255 bytes; the capital is interned
LONG_TEXT = b"uatA"
TUPLES = b"()"
SETS = b"<>"
CODE_INTS = 5  # argcount, posonlyargcount, kwonlyargcount, stacksize, flags
CODE_PARTS = 8  # code, consts, names, localsplusnames, localspluskinds, filename, name, qualname
CODE_TABLES = 2  # after the first line number: linetable, exceptiontable
WORTH_SHARING = 6  # bytes; a reference takes five


@dataclass(slots=True)
class Node:
    """One object of the stream. `head` is its type byte and fixed data; `middle` stands before the last
    two children of a code object. `content` is all of it without references."""

    head: bytes
    children: list[Node]
    middle: bytes = b""
    content: bytes = b""


class Reader:
    """Reads one stream. Raises ValueError on a type that compiled code does not hold."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.references: list[Node | None] = []

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def integer(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    def node(self) -> Node:
        first = self.take(1)[0]
        kind = bytes([first & ~FLAG_REF])
        if kind == b"r":
            found = self.references[self.integer()]
            if found is None:
                raise ValueError("cannot read compiled code: an object refers to itself")
            return found
        index = len(self.references)
        if first & FLAG_REF:
            self.references.append(None)
        result = self.body(kind)
        result.content = result.head + b"".join(c.content for c in result.children[: self.early(result)])
        result.content += result.middle
        result.content += b"".join(c.content for c in result.children[self.early(result) :])
        if first & FLAG_REF:
            self.references[index] = result
        return result

    @staticmethod
    def early(node: Node) -> int:
        """How many children stand before `middle`."""
        return CODE_PARTS if node.middle else len(node.children)

    def body(self, kind: bytes) -> Node:
        if kind in SINGLETONS:
            return Node(kind, [])
        if kind in SHORT_TEXT:
            return text(self.take(self.take(1)[0]))
        if kind in LONG_TEXT:
            return text(self.take(self.integer()))
        if kind == b"s":
            size = self.integer()
            return Node(b"s" + struct.pack("<i", size) + self.take(size), [])
        if kind == b"c":
            return self.code()
        return self.number_or_many(kind)

    def number_or_many(self, kind: bytes) -> Node:
        if kind == b"i":
            return Node(kind + self.take(4), [])
        if kind == b"g":
            return Node(kind + self.take(8), [])
        if kind == b"y":
            return Node(kind + self.take(16), [])
        if kind == b"l":
            count = self.integer()
            return Node(kind + struct.pack("<i", count) + self.take(2 * abs(count)), [])
        if kind == b":":  # slice, 3.14
            return Node(kind, [self.node() for _ in range(3)])
        if kind not in TUPLES + SETS:
            raise ValueError(f"cannot read compiled code: unknown type {kind!r} at byte {self.at}")
        count = self.take(1)[0] if kind == b")" else self.integer()
        children = [self.node() for _ in range(count)]
        if kind in SETS:
            children.sort(key=lambda child: child.content)
            return Node(kind + struct.pack("<i", count), children)
        head = b")" + bytes([count]) if count < 256 else b"(" + struct.pack("<i", count)
        return Node(head, children)

    def code(self) -> Node:
        head = b"c" + self.take(4 * CODE_INTS)
        parts = [self.node() for _ in range(CODE_PARTS)]
        middle = self.take(4)
        return Node(head, parts + [self.node() for _ in range(CODE_TABLES)], middle)


def text(raw: bytes) -> Node:
    """A string. Whether Python happened to intern it is replaced by a rule: names are, others are not."""
    if not raw.isascii():
        return Node(b"u" + struct.pack("<i", len(raw)) + raw, [])
    named = raw.decode("ascii").isidentifier()
    if len(raw) < 256:
        return Node((b"Z" if named else b"z") + bytes([len(raw)]) + raw, [])
    return Node((b"A" if named else b"a") + struct.pack("<i", len(raw)) + raw, [])


class Writer:
    """Writes a tree; what occurs more than once is written once and referred to."""

    def __init__(self, root: Node) -> None:
        self.counts: Counter[bytes] = Counter()
        self.places: dict[bytes, int] = {}
        self.out = bytearray()
        self.count(root)
        self.write(root)

    @staticmethod
    def shared(node: Node) -> bool:
        return node.head[:1] != b"c" and len(node.content) >= WORTH_SHARING

    def count(self, node: Node) -> None:
        if self.shared(node):
            self.counts[node.content] += 1
            if self.counts[node.content] > 1:
                return
        for child in node.children:
            self.count(child)

    def write(self, node: Node) -> None:
        head = node.head
        if self.shared(node) and self.counts[node.content] > 1:
            if node.content in self.places:
                self.out += b"r" + struct.pack("<i", self.places[node.content])
                return
            self.places[node.content] = len(self.places)
            head = bytes([head[0] | FLAG_REF]) + head[1:]
        self.out += head
        early = Reader.early(node)
        for child in node.children[:early]:
            self.write(child)
        self.out += node.middle
        for child in node.children[early:]:
            self.write(child)


def dumps(code: CodeType) -> bytes:
    """`code` as a marshal stream with the same bytes in every run."""
    return bytes(Writer(Reader(marshal.dumps(code)).node()).out)


def pyc(source: bytes, name: str) -> bytes:
    """The .pyc file for `source`, never compared with its source file when it is loaded.

    `name` is what tracebacks show; the caller gives one that says nothing of this machine.
    """
    code = compile(source, name, "exec", dont_inherit=True, optimize=0)
    unchecked_hash = 0b01
    header = importlib.util.MAGIC_NUMBER + struct.pack("<I", unchecked_hash)
    return header + importlib.util.source_hash(source) + dumps(code)
