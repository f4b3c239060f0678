"""The program file as bytes: its digest, and the zip comment in which the configuration rides.

A zip file ends in its end-of-central-directory record (EOCD): signature `PK\\5\\6`, 22 bytes, the last
two of which give the length of the comment that follows up to the end of the file. The program
digest is SHA-384 over everything before those two bytes, so it is the same for every comment.

    >>> import io, zipfile
    >>> file = io.BytesIO(); zipfile.ZipFile(file, "w").close()
    >>> plain = file.getvalue()
    >>> program_digest(join_program(plain, b"YQ==.Yg==")) == program_digest(plain)
    True

Python's zipimport searches the *last* 64 KiB for the *last* `PK\\5\\6`, so a comment that holds one
would run another program than the one that was digested. Hence a file with such a comment is refused.
"""

from __future__ import annotations

import hashlib
import struct

from instar.core.errors import InputError

EOCD = b"PK\x05\x06"
EOCD_SIZE = 22
MAX_COMMENT = 65_535  # bytes; the field has 16 bits
TAIL = 2 * (EOCD_SIZE + MAX_COMMENT)  # bytes at the end that say what the rest is


def program_digest(data: bytes) -> str:
    """SHA-384, hexadecimal, of the program up to, and without, the length of its comment.

    Raises InputError `bad-program` when `data` is no such program.
    """
    end = _eocd(data) + EOCD_SIZE - 2
    return hashlib.sha384(memoryview(data)[:end]).hexdigest()


def digested_length(tail: bytes, before: int) -> int:
    """How many bytes of a program the digest covers, from the last TAIL of them; `before` are left out.

    For one that is too large to be held. Raises InputError `bad-program`.
    """
    return before + _eocd(tail, before) + EOCD_SIZE - 2


def split_program(data: bytes) -> tuple[bytes, bytes]:
    """(`data` with an empty comment, the comment). Raises InputError `bad-program`."""
    start = _eocd(data)
    return data[: start + EOCD_SIZE - 2] + b"\0\0", data[start + EOCD_SIZE :]


def join_program(program: bytes, comment: bytes) -> bytes:
    """`program` with `comment` instead of the one that it has.

    Raises InputError `bad-program`, `comment-too-large`, and `bad-comment` for a comment with `PK` in it.
    """
    if len(comment) > MAX_COMMENT:
        raise InputError(
            "comment-too-large",
            f"cannot embed the configuration: expected at most {MAX_COMMENT} bytes, got {len(comment)}",
        )
    if b"PK" in comment:
        raise InputError("bad-comment", "cannot embed the configuration: the comment holds 'PK'")
    start = _eocd(program)
    return program[: start + EOCD_SIZE - 2] + struct.pack("<H", len(comment)) + comment


def _eocd(data: bytes, before: int = 0) -> int:
    """Where the one EOCD record starts. It must be the last signature, and its comment end the file.
    `before` bytes of the file are not in `data`."""
    start = data.rfind(EOCD)
    if start < 0 or len(data) - start < EOCD_SIZE:
        raise InputError("bad-program", "cannot read the program: it has no end-of-central-directory record")
    stated = struct.unpack_from("<H", data, start + EOCD_SIZE - 2)[0]
    got = len(data) - start - EOCD_SIZE
    if stated != got:
        raise InputError(
            "bad-program",
            f"cannot read the program: its last record states a comment of {stated} bytes, got {got}",
        )
    _refuse_outer(data, start)
    _check_directory(data, start, before)
    return start


def _refuse_outer(data: bytes, start: int) -> None:
    """Refuse a record inside another one's comment: two programs in one file, and readers differ."""
    begin = max(0, start - MAX_COMMENT - EOCD_SIZE)
    at = data.rfind(EOCD, begin, start)
    while at >= 0:
        if at + EOCD_SIZE <= len(data):
            stated = struct.unpack_from("<H", data, at + EOCD_SIZE - 2)[0]
            if at + EOCD_SIZE + stated == len(data):
                raise InputError(
                    "bad-program", "cannot read the program: its comment holds another zip file's record"
                )
        at = data.rfind(EOCD, begin, at)


def _check_directory(data: bytes, start: int, before: int) -> None:
    """The central directory must end where the record starts, and lie within the file, on one disk."""
    disk, first, here, entries, size, offset = struct.unpack_from("<HHHHII", data, start + 4)
    if disk or first or here != entries:
        raise InputError("bad-program", "cannot read the program: a zip file of several disks")
    if entries == 0xFFFF or 0xFFFFFFFF in (size, offset):
        raise InputError("bad-program", "cannot read the program: zip64 is not supported")
    if size + offset > before + start:
        raise InputError(
            "bad-program",
            f"cannot read the program: expected its directory to end by byte {before + start}, got {size + offset}",
        )
