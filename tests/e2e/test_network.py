"""The network and the server fail in the middle of updates: nothing is lost, and no release is blamed for it."""

from __future__ import annotations

import json
import random
import time
from urllib.parse import parse_qs

from instar_lab import machine
from instar_lab.node import Node
from tests.e2e.conftest import LINES, NEW, OLD, Stage, health, look, said, settings, settled, updates
from tests.e2e.mirror import Answer, Cut, Mirror, Request


def query(request: Request) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(request.target.partition("?")[2]).items()}


def goes_down_on_trial(mirror: Mirror) -> None:
    """The server is gone from the moment on that somebody asks how the trial goes."""

    def rule(request: Request) -> None:
        if request.path.endswith("/verdict") and query(request)["phase"] == "trial":
            mirror.down = True
            mirror.loop.call_later(0.01, lambda: [task.cancel() for task in list(mirror._tasks)])

    mirror.rule = rule


def stretched(node: Node) -> bool:
    found = node.history()
    return bool(found) and any("network is at fault" in c["reason"] for c in found[-1]["changes"])


def test_the_server_is_away_during_the_trial_and_comes_back(stage: Stage) -> None:
    node, mirror = stage.mirrored(settings(hold_s=0.5, lease_s=10.0, cap_s=180.0))
    goes_down_on_trial(mirror)
    stage.want(NEW, ("agent",))
    look(node)
    machine.wait_for(
        lambda: stretched(node), "a stretched lease", 90.0, lambda: node.cli("history") + node.logs()
    )
    assert node.digests()["agent"] == stage.hall.programs[NEW].digest
    assert "on trial" in node.cli("status")
    mirror.rule, mirror.down = (lambda request: None), False
    time.sleep(0.6)  # the updater finds it first, before the agent has come back: that is no fault either
    said(node, "agent", "look")
    updates(node, NEW, ("agent",))
    kinds = {entry["phase"] for entry in machine.wait_for(
        lambda: [e for e in stage.server.history(node.id) if e["reason_code"] == "trial-stretched"],
        "the stretched lease at the server", 60.0)}  # fmt: skip
    assert kinds == {"trial"}


def test_the_server_is_away_for_longer_than_the_cap(stage: Stage) -> None:
    node, mirror = stage.mirrored(settings(hold_s=0.5, lease_s=5.0, cap_s=10.0))
    goes_down_on_trial(mirror)
    stage.want(NEW, ("agent",))
    look(node)
    (entry,) = settled(node, 1)
    assert (entry["state"], entry["reason"]["code"]) == ("reverted", "unconfirmed"), entry
    assert json.loads(node.cli("quarantine", "--json"))["entries"] == []  # nobody is to blame
    assert node.digests()["agent"] == stage.hall.programs[OLD].digest
    mirror.rule, mirror.down = (lambda request: None), False
    updates(node, NEW, ("agent",), before=1)  # and it is tried again by itself


def test_the_server_is_killed_at_a_random_moment(stage: Stage) -> None:
    node = stage.node(settings(hold_s=0.8))
    stage.want(NEW)
    look(node)
    moment = random.uniform(0.2, 4.0)
    time.sleep(moment)
    stage.server.kill()
    time.sleep(1.5)
    stage.server.start()
    updates(node, NEW)
    stage.connected(node, 60.0)
    seen = stage.server.history  # checks the chain as well

    def all_told() -> bool:
        told = {entry["id"] for entry in seen(node.id)}
        ours = {f"{e['tx']}:{c['number']}" for e in node.history() for c in e["changes"]}
        return ours <= told

    machine.wait_for(all_told, f"every change of state at the server (killed after {moment:.2f} s)", 60.0)
    ids = [entry["id"] for entry in seen(node.id)]
    assert len(ids) == len(set(ids))


def test_a_download_that_is_cut_goes_on_and_keeps_to_its_rate(stage: Stage) -> None:
    rate = 300_000
    node, mirror = stage.mirrored(settings(more=f"[network]\nrate_bytes_s = {rate}\n"))
    cuts = [200_000, 1, 250_000, 0]
    ranges: list[str] = []

    def rule(request: Request) -> Cut | None:
        if not request.path.startswith("/v1/targets/"):
            return None
        ranges.append(request.headers.get("range", ""))
        return Cut(cuts.pop(0)) if cuts else None

    mirror.rule = rule
    stage.want(NEW, ("agent",))
    updates(node, NEW, ("agent",))
    size = len(stage.hall.releases[NEW].archive)
    served = sum(count for path, count in mirror.served.items() if path.startswith("/v1/targets/"))
    assert size <= served < size * 1.1
    assert len(ranges) == 5
    assert ranges[0] == ""
    assert all(each.startswith("bytes=") for each in ranges[1:])
    (entry,) = node.history()
    walls = {change["state"]: change["wall"] for change in entry["changes"]}
    assert walls["staged"] - walls["offered"] > 0.8 * size / rate


def test_everything_goes_through_the_proxy(stage: Stage) -> None:
    proxy = stage.proxy()
    node, mirror = stage.mirrored(
        settings(more=f'[network]\nproxy = "http://127.0.0.1:{proxy.port}"\n'), start=True
    )
    stage.want(NEW)
    updates(node, NEW)
    assert set(proxy.tunnels) == {f"127.0.0.1:{mirror.port}"}
    assert len(proxy.tunnels) == mirror.connections  # no connection came another way
    assert mirror.asked["/v1/channel"] >= 3  # the agent, its successor, and rehearsals
    assert mirror.asked["/v1/metadata/timestamp.json"] >= 2  # the verify child
    assert mirror.asked["/v1/node/wanted"] >= 1


def test_a_busy_server_never_costs_a_release(stage: Stage) -> None:
    node, mirror = stage.mirrored(settings(hold_s=0.5, lease_s=60.0, cap_s=120.0))
    answers = [503, 429, 500, 502, 503, 429]
    bad: dict[str, list[int]] = {"rehearsal": list(answers[:3]), "trial": list(answers)}
    also = {"/v1/node/wanted": [503], "/v1/node/events": [503, 429]}

    def rule(request: Request) -> Answer | None:
        left = also.get(request.path, [])
        if request.path.endswith("/verdict"):
            left = bad[query(request)["phase"]]
        if left:
            body = {"error": {"code": "busy", "message": "cannot answer now"}}
            return Answer(left.pop(0), body if len(left) % 2 else b"<html>busy</html>", {"Retry-After": "1"})
        return None

    mirror.rule = rule
    stage.want(NEW)
    updates(node, NEW)
    assert bad == {"rehearsal": [], "trial": []}
    assert [entry["state"] for entry in node.history()] == ["confirmed"] * len(LINES)
    assert health(node)["connected"]
