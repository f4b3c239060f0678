"""When a certificate holds: the two times of an X.509 certificate, without a crypto library.

Reads DER (X.690) just far enough: Certificate → TBSCertificate → [0] version, serialNumber, signature,
issuer, validity (RFC 5280, 4.1). Whether the certificate can be trusted is TLS's business, not ours.
"""

from __future__ import annotations

import binascii
from typing import NamedTuple

from instar.core.errors import InputError

BEGIN, END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
SEQUENCE, EXPLICIT_0, UTC_TIME, GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


class Validity(NamedTuple):
    """Unix times."""

    not_before: float
    not_after: float

    def renew_at(self, spread01: float) -> float:
        """Two thirds into its life, or up to a tenth earlier, so that a fleet does not renew at once."""
        life = self.not_after - self.not_before
        return self.not_before + life * (2 / 3 - spread01 / 10)


def validity(pem: bytes) -> Validity:
    """Of the first certificate in `pem`. Raises InputError `bad-certificate`."""
    try:
        body = pem.split(BEGIN, 1)[1].split(END, 1)[0]
        certificate, _ = _value(binascii.a2b_base64(body), SEQUENCE)
        rest, _ = _value(certificate, SEQUENCE)
        if rest[0] == EXPLICIT_0:
            rest = _value(rest, EXPLICIT_0)[1]
        for _skipped in ("serialNumber", "signature", "issuer"):
            rest = _value(rest, rest[0])[1]
        times, _ = _value(rest, SEQUENCE)
        first, times = _time(times)
        return Validity(first, _time(times)[0])
    except (IndexError, ValueError) as error:  # binascii.Error is a ValueError
        text = f"cannot read certificate: expected X.509 in PEM, got {error!s:.80}"
        raise InputError("bad-certificate", text) from error


def _value(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """(contents of the element at the start of `data`, what follows it)."""
    if data[0] != tag:
        raise ValueError(f"tag {data[0]:#x} instead of {tag:#x}")
    size, start = data[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(data[2:start], "big")
    if start + size > len(data):
        raise ValueError("a cut-off element")
    return data[start : start + size], data[start + size :]


def _time(data: bytes) -> tuple[float, bytes]:
    """RFC 5280: two-digit years from 50 on are of the 20th century; always in UTC, with seconds."""
    tag = UTC_TIME if data[0] == UTC_TIME else GENERALIZED_TIME
    raw, rest = _value(data, tag)
    text = raw.decode("ascii").removesuffix("Z")
    if tag == UTC_TIME:
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    if len(text) != 14:
        raise ValueError("a time without seconds")
    month, day, hour, minute, second = (int(text[at : at + 2]) for at in range(4, 14, 2))
    days = days_since_1970(int(text[:4]), month, day)
    return float(((days * 24 + hour) * 60 + minute) * 60 + second), rest


def days_since_1970(year: int, month: int, day: int) -> int:
    """Of a Gregorian date. Years are counted from March, so that the leap day is the last of its year.

    Spelled out because the datetime module costs the resident 280 KiB.

    >>> days_since_1970(1970, 1, 1), days_since_1970(2000, 3, 1)
    (0, 11017)
    """
    if not 1 <= month <= 12:
        raise ValueError(f"month {month}")
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)
    leap_days = year // 4 - year // 100 + year // 400
    return 365 * year + leap_days + (153 * month + 2) // 5 + day - 719_469
