"""Load python-tuf without urllib3 and without cryptography. Call `apply` before the first tuf import.

Why: a node's program is pure Python and carries neither. tuf imports its urllib3 fetcher at the top of
`tuf.ngclient` although a caller's own fetcher is used, so an empty module takes its place. And where a
distribution happens to have `cryptography` installed, securesystemslib would pick it up, with versions
that nobody tested: it is hidden, so that every node verifies ed25519 by the same vendored pure Python
(verification only, of public data: it needs no constant time). This holds for this process alone.
"""

from __future__ import annotations

import sys
import types

FETCHER = "tuf.ngclient.urllib3_fetcher"


def apply() -> None:
    """Put the two stand-ins in place. Doing it twice is harmless."""
    if FETCHER not in sys.modules:
        stand_in = types.ModuleType(FETCHER)
        stand_in.Urllib3Fetcher = type("Urllib3Fetcher", (), {})  # type: ignore[attr-defined]
        sys.modules[FETCHER] = stand_in
    if sys.modules.get("cryptography") is None:
        sys.modules["cryptography"] = None  # type: ignore[assignment]
