"""A power cut at any instruction of a job's way through the store: never twice, never lost, never another result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instar.agent.store import DiskStore
from instar.wire.messages import Job, Result
from tests.node.powercut import PowerCut, PowerDisk

MEMORY = Path("/dev/shm")
RESULT = Result("x", True, {"a": 1})
OTHER = Result("y", True, {"b": 2})
THIRD = Result("z", True, {"c": "x" * 9000})  # too much for what was a spare


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    parent = str(MEMORY) if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="i-", dir=parent, ignore_cleanup_errors=True) as name:
        yield Path(name)


def folder(place: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=place))


def play(store: DiskStore, done: list[str], soon: bool) -> None:
    """Jobs, one after the other; `done` gets the name of each step that returned. The first finds no spare."""
    for result in (RESULT, OTHER, THIRD):
        store.receive(Job(result.id, "m"), soon)
        done.append(f"taken {result.id}")
        store.start(result.id)
        done.append(f"ran {result.id}")
        store.finish(result)
        done.append(f"sent {result.id}")
        done.append(f"stored by the server {result.id}")
        store.acknowledged(result.id)


@settings(max_examples=800, deadline=None)
@given(
    st.integers(0, 60),
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    st.booleans(),
    st.integers(0, 2**48 - 1),
    st.booleans(),
)
def test_a_power_cut_anywhere(
    place: Path, cut: int, inside: float, zeros: bool, chosen: int, soon: bool
) -> None:
    root, after = folder(place), folder(place) / "after"
    DiskStore(root)
    disk = PowerDisk(root, cut, inside, zeros)
    done: list[str] = []
    try:
        play(DiskStore(root, disk=disk, boot_id="before", apart=lambda work: work()), done, soon)
    except PowerCut:
        pass
    disk.reboot(after, lambda number: bool(chosen >> (number % 48) & 1))

    store = DiskStore(after, boot_id="after")
    waiting = {each.job.id for each in store.recover()}
    for result in (RESULT, OTHER, THIRD):
        name, found = result.id, store.result(result.id)
        if f"taken {name}" in done:
            assert store.known(name), "what was taken is not lost"
        if f"ran {name}" in done:
            assert name not in waiting, "what ran is not run again"
            assert found is not None or f"stored by the server {name}" in done, "and its end is told"
        if f"sent {name}" in done:
            assert found in (result, None), "a result never changes"
        elif found is not None:
            assert found == result or found.code == "interrupted"
    again = DiskStore(after, boot_id="after")
    assert {each.job.id for each in again.recover()} == waiting
    for name in store.unacknowledged():
        assert again.result(name) == store.result(name)
