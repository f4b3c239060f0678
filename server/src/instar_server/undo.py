"""`init` that fails leaves the data folder as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from instar_server.settings import Layout


@contextlib.contextmanager
def undone(layout: Layout) -> Iterator[None]:
    """When the block fails, what is new below the data folder is removed, and the folder too if it is new.

    What was there stays, and so does whatever is not of a server: only the parts of `layout` are looked at.
    """
    absent = [folder for folder in (layout.data, *layout.data.parents) if not folder.exists()]
    before = _parts(layout)
    try:
        yield
    except BaseException as error:
        if getattr(error, "code", "") != "repository-in-use":  # else another process is making it just now
            for path in sorted(_parts(layout) - before, reverse=True):  # a folder's content before itself
                _remove(path)
            for folder in absent:
                _remove(folder)
        raise


def _parts(layout: Layout) -> set[Path]:
    """Every path of the server's parts that is there."""
    folders = (layout.ca, layout.certificate.parent, layout.trust, layout.online)
    database = layout.data.glob(f"{layout.database.name}*")  # with its -wal and -shm
    tops = (*folders, *database, layout.admin_token, layout.config)
    return {path for top in tops if top.exists() for path in (top, *top.rglob("*"))}


def _remove(path: Path) -> None:
    """A file, or a folder that is empty; anything else stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
