"""config.toml, and its one reader. The parser is imported only where there is a file to parse."""

from __future__ import annotations

from instar.core.errors import InputError
from instar.core.settings import Settings, read_settings
from instar.host.layout import Layout


def read_config(layout: Layout) -> Settings:
    """The defaults where there is no file.

    Raises InputError `bad-config` naming the fault. Callers that must run go on with `Settings()`.
    """
    import tomllib

    try:
        return read_settings(tomllib.loads(layout.config.read_text()))
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("bad-config", f"cannot read {layout.config}: {error}") from None
