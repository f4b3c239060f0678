"""config.toml, and its one reader. Whoever needs no setting of it pays for no parser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from instar.core.errors import InputError
from instar.host.layout import Layout

if TYPE_CHECKING:
    from instar.core.settings import Settings

TABLES = (
    b"[trial]",
    b"[rehearsal]",
    b"[probe]",
    b"[network]",
    b"[updater]",
    b"[wake]",
    b"[modules]",
    b"[native]",
    b"[os]",
)


def has_settings(layout: Layout) -> bool:
    """Whether there is anything to read: the file that `install` writes has tables and comments only.

    The parser and the settings' types would cost the resident agent 0.4 MiB and each of its starts 5 ms.
    """
    try:
        lines = layout.config.read_bytes().split(b"\n")
    except FileNotFoundError:
        return False
    except OSError:
        return True  # `read_config` says what is wrong
    bare = (line.strip(b" \t\r") for line in lines)
    return any(line and not line.startswith(b"#") and line not in TABLES for line in bare)


def read_config(layout: Layout) -> Settings:
    """The defaults where there is no file.

    Raises InputError `bad-config` naming the fault. Callers that must run go on with `Settings()`.
    """
    import tomllib

    from instar.core.settings import Settings, read_settings

    try:
        return read_settings(tomllib.loads(layout.config.read_text()))
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("bad-config", f"cannot read {layout.config}: {error}") from None
