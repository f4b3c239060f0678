"""Every way to a new release under real systemd, with agent, updater and recovery core killed and the power cut.

A seed decides who is killed, and when: INSTAR_SEED sets it, and every run prints its own. INSTAR_UPDATES is how
many updates the long test makes.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from instar_lab import machine
from instar_lab.container import Container
from instar_lab.program import recovery
from tests.os import ways
from tests.os.conftest import NEW, OLD, Hall
from tests.os.node import AGENT, UPDATER
from tests.os.packaged import PackagedNode
from tests.os.ways import Disturber, Operator

pytestmark = pytest.mark.xdist_group("containers")

UPDATES, POWER_CUTS = 100, 10
CORE = "9.0.0"


@pytest.fixture
def chance() -> random.Random:
    seed = int(os.environ.get("INSTAR_SEED") or random.SystemRandom().randrange(2**32))
    print(f"INSTAR_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def core(hall: Hall) -> None:
    hall.server.publish_recovery(recovery.build_core(CORE))


@pytest.fixture
def packaged(hall: Hall, core: None, container: Container) -> Iterator[PackagedNode]:
    group = f"w-{container.folder.name}"
    hall.server.api.post("/groups", {"name": group})
    node = PackagedNode(container, hall.server, hall.programs, group)
    node.api = f"127.0.0.1:{machine.free_port()}"
    node.set_up(OLD)
    yield node
    hall.server.check()


@pytest.fixture
def operator(packaged: PackagedNode) -> Operator:
    return Operator(packaged, packaged.container.folder / "operator")


def test_each_way_once(packaged: PackagedNode, operator: Operator, chance: random.Random) -> None:
    node, disturber = packaged, Disturber(packaged, chance)
    for way, version in zip(ways.WAYS, (NEW, OLD, NEW, OLD), strict=True):
        began = time.monotonic()
        assert ways.update(node, operator, way, version) == version, ways.state(node)
        last = node.history()[-1]
        assert (last["version"], last["state"], last["via"] or "pull") == (version, "confirmed", way), last
        print(f"{way}: {time.monotonic() - began:.1f} s")
    victim, way = chance.choice(("agent", "updater")), chance.choice(ways.WAYS)
    ran = ways.update(node, operator, way, NEW, lambda: disturber.kill_some(way))
    print(f"{way}, killed {disturber.told}: {ran} runs")
    assert disturber.kill(victim) or victim == "updater"  # which leaves when it is idle
    ways.settled(node, ran, set())
    assert node.container.run("systemctl", "--failed", "--no-legend").stdout == ""


@pytest.mark.soak
@pytest.mark.os
def test_many_updates_with_kills_and_power_cuts(
    packaged: PackagedNode, operator: Operator, chance: random.Random
) -> None:
    node = packaged
    updates = int(os.environ.get("INSTAR_UPDATES") or UPDATES)
    cuts = set(chance.sample(range(updates), min(updates, POWER_CUTS)))
    ends: Counter[str] = Counter()
    runs = OLD
    for number in range(updates):
        way, aim = ways.WAYS[number % len(ways.WAYS)], NEW if runs == OLD else OLD
        disturber, began = Disturber(node, chance), time.monotonic()
        disturb = disturber.cut_power if number in cuts else lambda d=disturber, w=way: d.kill_some(w)
        runs = ways.update(node, operator, way, aim, disturb)
        how = "confirmed" if runs == aim else f"went back: {ways.reason(node, aim)}"
        ends[f"{way} {how.partition(':')[0]}"] += 1
        took = time.monotonic() - began
        print(
            f"{number + 1:3} {way:8} to {aim}: {how}, {took:.1f} s, {', '.join(disturber.told)}", flush=True
        )
        assert "too-old" not in how, "a day has not passed"
        assert node.active(AGENT) == "active"
        assert node.active(UPDATER) in ("active", "inactive", "activating")
    print(dict(sorted(ends.items())))
    assert all(ends[f"{way} confirmed"] for way in ways.WAYS), ends
