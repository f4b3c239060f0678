"""A release's bytes from a parcel that is on this node already, instead of from the server.

Nothing that the parcel says is believed: its metadata are verified as if they had been fetched, and its
archive is taken only if it is the one that is signed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from instar.core.errors import InstarError, TrustError
from instar.core.journal import Begin
from instar.core.reason import Reason
from instar.engine.target import NotNow
from instar.host.files import failed
from instar.host.incoming import Incoming, Parcel
from instar.host.points import reach
from instar.targets.kit import Kit, TrustedTarget

WAITS = "waits-for-parcel"

log = logging.getLogger("instar.updater")


def found(kit: Kit, begin: Begin, archive: Path | None) -> Parcel | None:
    """The parcel for this transaction, marked as needed until `tidy` finds that it has ended. None where there
    is none, and it may go without: it may fetch, a recovery core has brought the `archive` by itself, or its bytes
    are not needed (None), and only what is signed has to be known. Raises NotNow `waits-for-parcel`."""
    incoming = Incoming(kit.layout.incoming, kit.disk)
    parcel = incoming.find(begin.line, begin.digest)
    if parcel is not None:
        incoming.need(parcel)
    if parcel is None and begin.via and archive is not None and not archive.exists():
        text = f"{begin.version} is to come by {begin.via}, and has not come yet"
        raise NotNow(Reason(WAITS, text))
    return parcel


def drop(kit: Kit, parcel: Parcel, why: InstarError) -> None:
    """Remove one that cannot be used. Idempotent. Raises MachineError when the disk fails."""
    log.warning("the parcel of %s is removed: %s (%s)", parcel.version, why.text, why.code)
    Incoming(kit.layout.incoming, kit.disk).remove(parcel)


def take(kit: Kit, parcel: Parcel, signed: TrustedTarget, archive: Path) -> None:
    """Put the parcel's archive to `archive`, if it is the signed one. It keeps its first name as well: the
    other line takes the same, and a kill right after this finds the parcel whole.

    Raises TrustError `altered-parcel`; then the parcel is gone. MachineError when the disk fails.
    """
    if (parcel.length, parcel.sha256) != (signed.length, signed.sha256):
        Incoming(kit.layout.incoming, kit.disk).remove(parcel)
        text = f"the parcel's archive is not the signed one: SHA-256 {parcel.sha256}, not {signed.sha256}"
        raise TrustError("altered-parcel", text)
    with contextlib.suppress(FileNotFoundError):
        kit.disk.unlink(archive)
    try:
        _second_name(parcel.archive, archive)
    except OSError as error:
        raise failed("stage", archive, error) from error
    reach("parcel:taken")
    kit.brought(signed.length, signed.length)


def _second_name(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(old, new)
