"""`fetch-module`: once, resumed, killed at any time, and many at once."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from instar.host.records import write_artifacts
from instar_server.trust.module_source import pack_module
from tests.trust.modules import MAIN, NAME, Fetcher, Source


def test_a_module_is_fetched_once_and_kept(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source()))
    answer = node.fetch(release)
    assert answer == {"ok": True, "release": f"1.0.0-{release.digest[:12]}"}
    node.line.check(answer["release"])
    folder = node.line.folder(answer["release"])
    assert (folder / "main.py").read_text() == MAIN
    assert (folder / "main.py").stat().st_mode & 0o777 == 0o444
    assert not list(node.layout.module(NAME).incoming.iterdir())
    node.world.asked.clear()
    assert node.fetch(release) == answer
    assert node.world.asked == [], "what is there needs no server"


def test_a_module_is_fetched_from_where_metadata_and_targets_are(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source()))
    known = json.loads(node.layout.node.read_bytes())
    node.layout.node.write_text(json.dumps({**known, "server": "https://127.0.0.1:1"}))
    node.layout.run.mkdir()
    write_artifacts(node.layout, known["server"])
    assert node.fetch(release)["ok"]
    assert any(path.endswith("@0") for path in node.world.asked), "it was asked there"


def test_a_cut_is_resumed_also_after_a_kill(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source({"main.py": MAIN, "noise": os.urandom(300_000)})))
    part = node.layout.module(NAME).incoming / f"{release.digest}.part"
    (node.layout.module(NAME).incoming).mkdir(parents=True)
    part.with_name("other.part").write_bytes(b"left by another fetch")
    part.write_bytes(release.archive[:100_000])
    node.world.cut_at = [200_000]  # type: ignore[attr-defined]
    assert node.fetch(release)["ok"] is True
    starts = [asked.rpartition("@")[2] for asked in node.world.asked if "@" in asked]
    assert starts == ["100000", "200000"]
    assert not part.with_name("other.part").exists()


def test_killed_at_any_time_it_is_done_by_the_next(node: Fetcher, source: Source) -> None:
    release = node.publish(
        pack_module(source({"main.py": MAIN, **{f"f{n}": os.urandom(2000) for n in range(30)}}))
    )
    name = f"1.0.0-{release.digest[:12]}"
    for number in range(12):
        child = node.start(release)
        time.sleep(0.05 + 0.05 * number)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=30)
        marked = (node.line.folder(name) / "valid").exists()
        assert marked is node.line.is_valid(name), "half of it counts as whole"
    assert node.fetch(release)["ok"] is True
    node.line.check(name)


def test_many_at_once_fetch_it_once(node: Fetcher, source: Source) -> None:
    release = node.publish(pack_module(source({"main.py": MAIN, "noise": os.urandom(50_000)})))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: node.fetch(release), range(4)))
    assert all(answer["ok"] for answer in answers), answers
    assert len([asked for asked in node.world.asked if "@" in asked]) == 1
