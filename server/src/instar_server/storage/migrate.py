"""Bring the database file to the schema that this program knows. Run before the server starts."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

HEAD = "0006"  # the newest migration; a test compares


def upgrade(path: Path, revision: str = HEAD) -> None:
    """Make or migrate the database at `path` (mode 0600). Blocking.

    Alembic is imported only when there is something to do: it costs as much as the rest of the start.
    """
    if not path.exists():
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    if current(path) == revision:
        return
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{path}")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            connection.exec_driver_sql("PRAGMA synchronous=FULL")
            config = Config()
            config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
            connection.commit()
    finally:
        engine.dispose()


def current(path: Path) -> str | None:
    """The migration that the database at `path` is at; None for an empty one."""
    connection = sqlite3.connect(path)
    try:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError:
        return None
    finally:
        connection.close()
    return str(row[0]) if row else None
