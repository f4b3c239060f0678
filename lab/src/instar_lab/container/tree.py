"""The file trees that containers start from: each made once by debootstrap, never written again."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from instar.core.errors import MachineError

SUITE = "bookworm"
MAKE_S = 900.0

# Logs outlive a reboot, none is dropped, and no terminal is waited for.
JOURNALD = "[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\nSyncIntervalSec=1s\n"
MASKED = ("console-getty.service", "getty.target", "apt-daily.timer", "apt-daily-upgrade.timer")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a tree is made of. `systemd`: it is PID 1 there."""

    packages: tuple[str, ...]
    systemd: bool

    @property
    def name(self) -> str:
        """Another recipe, another name."""
        parts = (SUITE, *self.packages, JOURNALD, *MASKED) if self.systemd else (SUITE, *self.packages)
        text = "\n".join(parts)
        return f"debian-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


SYSTEMD = Recipe(("systemd", "systemd-sysv", "dbus", "python3"), systemd=True)
OTHERS = Recipe(("python3", "openrc", "runit", "supervisor"), systemd=False)


def made_tree(cache: Path, recipe: Recipe = SYSTEMD) -> Path | None:
    """The tree below `cache`, if it has been made."""
    tree = cache / recipe.name
    return tree if tree.is_dir() else None


def make_tree(cache: Path, recipe: Recipe = SYSTEMD, say: Callable[[str], None] = lambda _: None) -> Path:
    """The tree below `cache`; made when it is not there. Raises MachineError. Several callers may come at once.

    The folder gets its name last, so a tree with that name is complete.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (tree := made_tree(cache, recipe)) is not None:
            return tree
        unfinished = cache / f"{recipe.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        say(f"making a Debian {SUITE} tree below {cache}: about a minute")
        _debootstrap(unfinished, recipe)
        _adapt(unfinished, recipe)
        return unfinished.rename(cache / recipe.name)


def _debootstrap(folder: Path, recipe: Recipe) -> None:
    """From the mirror that debootstrap itself names."""
    words = [
        "debootstrap",
        "--variant=minbase",
        f"--include={','.join(recipe.packages)}",
        SUITE,
        str(folder),
    ]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=MAKE_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("no-tree", f"cannot make a Debian tree: {error}") from None
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()[-2000:]
        raise MachineError(
            "no-tree", f"cannot make a Debian tree: debootstrap ended with {done.returncode}: {said}"
        )


def _adapt(tree: Path, recipe: Recipe) -> None:
    for cached in (tree / "var/cache/apt/archives").glob("*.deb"):
        cached.unlink()
    if not recipe.systemd:
        return
    drop_in = tree / "etc/systemd/journald.conf.d/lab.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(JOURNALD)
    (tree / "var/log/journal").mkdir(exist_ok=True)
    (tree / "etc/machine-id").write_text("")  # every container gets one of its own
    for unit in MASKED:
        (tree / "etc/systemd/system" / unit).symlink_to("/dev/null")
