"""`instarctl` for the systems of nodes, against a real server; and bundles on their way to being published."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from instar_lab.machine import free_port
from instar_server.ctl.main import app
from instar_server.trust import offline
from tests.server import systems
from tests.server.following import Following
from tests.server.systems import at_work, make_bundle, new_node, report, say, slot, tell, view, wanted
from tests.server.test_ctl import ctl, data
from tests.server.world import ROOT, WITHIN_S, Node, World, running


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("ctl"), ping_s=30.0, wrong_tokens=1000) as world:
        systems.publish(world, "1.1.0")
        yield world


@pytest.fixture
async def node(own: World) -> Node:
    return await asyncio.to_thread(new_node, own)


def update(node: str, *more: str, mode: str = "reboot") -> tuple[str, ...]:
    return ("node", "update-os", node, "--bundle", "web-1.1.0", "--activation", mode, *more)


async def told(node: Node) -> dict[str, Any]:
    """What the node is told, as soon as it is."""
    until = time.monotonic() + WITHIN_S
    while not (lines := (await asyncio.to_thread(wanted, node))["lines"]):
        assert time.monotonic() < until
        await asyncio.sleep(0.05)
    found: dict[str, Any] = lines["os"]
    return found


def test_an_order_returns_at_once(own: World) -> None:
    node = new_node(own)
    done = ctl(own, *update(node.id))
    assert (done.exit_code, "is ordered" in done.stdout) == (0, True), done.stderr
    made = view(own, node)["updates"][0]
    for words in (update(node.id), ("node", "cold-boot", node.id)):
        again = ctl(own, *words)
        assert (again.exit_code, "[aborted]" in again.stderr) == (6, True)
        assert made["id"] in again.stderr
    gone = data(own, "node", "cancel-os", node.id)
    assert (gone["id"], gone["state"]) == (made["id"], "cancelled")
    assert data(own, *update(node.id))["state"] == "open"


@pytest.mark.parametrize(
    ("words", "code", "status"),
    [
        (("--bundle", "web-1.1.0"), "invalid-argument", 6),
        (("--bundle", "web-1.1.0", "--activation", "halt"), "invalid-argument", 6),
        (("--activation", "none"), "invalid-argument", 6),
        (("--bundle", "web-9.9.9", "--activation", "none"), "not-found", 6),
        (("--bundle", "web-1.1.0", "--activation", "none", "--within", "soon"), "bad-time", 2),
    ],
)
def test_a_refusal_is_one_line(own: World, words: tuple[str, ...], code: str, status: int) -> None:
    done = ctl(own, "node", "update-os", new_node(own).id, *words)
    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr.startswith("instarctl: cannot ")
    assert f"[{code}]" in done.stderr
    assert len(done.stderr.splitlines()) == 1


async def follow(own: World, node: Node, *words: str) -> asyncio.Task[Any]:
    return asyncio.create_task(asyncio.to_thread(ctl, own, *words))


@pytest.mark.parametrize(
    ("mode", "after", "said"),
    [
        ("reboot", {"booted_by": "firmware", "cold_boot_seen": True}, "confirmed in slot b"),
        ("kexec", {"booted_by": "kexec", "cold_boot_seen": False}, "confirmed, cold boot not seen in slot b"),
        ("none", {"state": "installed"}, "installed, not active in slot b"),
    ],
)
async def test_what_went_well_is_waited_for(
    own: World, node: Node, mode: str, after: dict[str, Any], said: str
) -> None:
    waiting = Following(own, *update(node.id, "--wait", mode=mode))
    line = await told(node)
    g, digest = line["generation"], line["digest"]
    assert line["mode"] == mode
    for step, phase, done in (("stage", "offered", 100_000), ("verify", "staged", 300_000)):
        await asyncio.to_thread(say, node, "t", g, phase, first=done, mode=mode)
        await asyncio.to_thread(tell, node, update=at_work("t", g, step, done=done))
        await waiting.until_said(f"{phase}, {step}")
    await asyncio.to_thread(say, node, "t", g, "confirmed", first=999_999, mode=mode)
    await asyncio.sleep(0.2)
    now = report(running="b", slots={"a": slot(), "b": slot("1.1.0", digest, **after)})
    await asyncio.to_thread(tell, node, now)
    done = await waiting.done()
    assert done.exit_code == 0, done.stderr
    assert said in done.stdout
    assert "300.0/300.0 kB" in done.stderr  # the bar


@pytest.mark.parametrize(
    ("phases", "code", "first", "way"),
    [
        (("offered", "reverting"), "altered-bundle", "unavailable: altered-bundle why", "not what was signed"),
        (("offered", "reverting"), "cold-boot-not-seen", "failed-precondition: cold-boot-not-seen", "node cold-boot n-"),
        (("offered", "reverting"), "wrong-hardware", "failed-precondition: wrong-hardware why", "compatible"),
        (("trial", "reverting"), "fell-back", "reverted: fell-back why", "quarantine"),
        (("offered", "reverting"), "no-such-code", "unavailable: no-such-code why", "nodes history n-"),
    ],
)  # fmt: skip
async def test_what_went_wrong_says_why_and_the_way_out(
    own: World, node: Node, phases: tuple[str, ...], code: str, first: str, way: str
) -> None:
    waiting = await follow(own, node, *update(node.id, "--wait", "--json"))
    g = (await told(node))["generation"]
    await asyncio.to_thread(say, node, "t", g, *phases, reason={"code": code, "text": "why"})
    await asyncio.to_thread(say, node, "t", g, "reverted", first=3)
    done = await waiting
    assert done.exit_code == 1
    assert (json.loads(done.stdout)["code"], json.loads(done.stdout)["state"]) == (code, "reverted")
    reason, out = done.stderr.splitlines()
    assert first in reason
    assert way in out


async def test_a_nodes_words_rule_no_terminal_and_are_no_markup(own: World, node: Node) -> None:
    words = "\x1b]0;pwned\x07\x1b[2J\x9b2J see [os] in [/etc/instar]"
    waiting = await follow(own, node, *update(node.id, "--wait"))
    g = (await told(node))["generation"]
    await asyncio.to_thread(say, node, "t", g, "offered", "reverted", reason={"code": "odd", "text": words})
    ended = await waiting
    shown = [
        await asyncio.to_thread(ctl, own, *what, node.id)
        for what in (("node", "system"), ("nodes", "history"))
    ]
    for done, status in ((ended, 1), *((each, 0) for each in shown)):
        assert done.exit_code == status, done.stderr
        assert "[/etc/instar]" in done.stdout
        assert not set("\x1b\x07\x9b") & set(done.stdout + done.stderr)


async def test_waiting_ends_and_goes_on_after_a_cut(tmp_path: Path) -> None:
    ports = {"api_port": free_port(), "gateway_port": free_port()}
    world = await asyncio.to_thread(World, tmp_path, **ports)
    await asyncio.to_thread(world.start)
    try:
        await asyncio.to_thread(systems.publish, world)
        node = await asyncio.to_thread(new_node, world)
        done = await asyncio.to_thread(ctl, world, *update(node.id, "--wait", "--within", "1s"))
        assert done.exit_code == 1
        assert "not ended within 1s" in done.stderr
        assert "cancel-os" in done.stderr
        watching = Following(world, "node", "system", node.id, "--watch")
        await watching.until_said("web 1.1.0")
        await asyncio.to_thread(world.kill)
        await asyncio.to_thread(world.start)
        g = (await told(node))["generation"]
        await asyncio.to_thread(say, node, "t", g, "trial", "confirmed")
        await asyncio.to_thread(tell, node)
        done = await watching.done()
        assert done.exit_code == 0, done.stderr
        assert "confirmed" in done.stdout
    finally:
        await asyncio.to_thread(world.kill)


def test_both_slots_are_shown(own: World) -> None:
    node = own.new_node()
    done = ctl(own, "node", "system", node.id)
    assert (done.exit_code, "told of no slots" in done.stdout) == (0, True)
    boot = {"order": ["b", "a"], "once": "a", "tries": {"a": 2}, "drift": ["our entry for slot b was lost"]}
    bad = slot("1.2.0", "b" * 96, "bad", why="it hung on start")
    tell(node, slots={"a": slot(), "b": bad}, boot=boot, update=at_work("pushed", 0))
    shown = ctl(own, "node", "system", node.id).stdout
    for words in ("a (runs)", "1.0.0", "1.2.0", "bad", "it hung on start", "b, a; next, once: a", "our entry for slot b",
                  "pushed: stage slot b, 100,000 of 300,000 bytes, not ordered by this server"):  # fmt: skip
        assert words in shown, (words, shown)
    assert data(own, "node", "system", node.id)["boot"] == boot


def test_the_history_names_slot_versions_and_mode(own: World) -> None:
    node = new_node(own)
    g = data(own, *update(node.id, mode="kexec"))["generation"]
    why = {"code": "fell-back", "text": "slot a came up in place of slot b"}
    say(node, "t", g, "reverting", reason=why, from_version="1.0.0", mode="kexec")
    shown = ctl(own, "node", "history", node.id).stdout
    line = next(line for line in shown.splitlines() if "reverting" in line)
    for words in ("os (slot b, by kexec)", "1.0.0 -> 1.1.0", why["text"]):
        assert words in line
    assert "by kexec: ordered by" in shown


def test_cold_boots_are_ordered_and_taken_back(own: World) -> None:
    node = new_node(own)
    asked: list[tuple[list[str], float]] = [
        (["--in", "2h"], 7200), ([], 0), (["--at", str(int(time.time()) + 500)], 500),
    ]  # fmt: skip
    for words, seconds in asked:
        made = data(own, "node", "cold-boot", node.id, *words)
        assert abs(made["at"] - time.time() - seconds) < 30
    at = time.strftime("%Y-%m-%dT%H:%M", time.localtime(time.time() + 86_400))
    done = ctl(own, "node", "cold-boot", node.id, "--at", at)
    assert at.replace("T", " ") in done.stdout, done.output
    assert "cold boot" in ctl(own, "node", "system", node.id).stdout
    assert data(own, "node", "cold-boot", node.id, "--cancel") == {"deleted": True}
    for words, status, code in (
        (["--cancel"], 6, "not-found"), (["--at", "soon"], 2, "bad-time"), (["--in", "soon"], 2, "bad-time"),
        (["--at", "2020-01-01T00:00"], 6, "invalid-argument"), (["--in", "1h", "--cancel"], 2, "bad-options"),
    ):  # fmt: skip
        done = ctl(own, "node", "cold-boot", node.id, *words)
        assert (done.exit_code, f"[{code}]" in done.stderr) == (status, True), done.stderr


# ---- publishing bundles


def test_a_bundle_walks_from_its_file_to_the_listing(own: World, tmp_path: Path) -> None:
    path, built = make_bundle(tmp_path, "edge", "2.0.0", deny_kexec=("board-7",))
    targets, next_ = tmp_path / "targets.json", tmp_path / "next.json"
    targets.write_bytes(own.operator.targets)
    words = ["release", "add", str(path), "--targets", str(targets), "--out", str(next_), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["target"] == "os/edge-2.0.0.bundle"
    signed = next_.read_bytes()
    for key in own.operator.targets_keys[:2]:
        signed = offline.sign(signed, key, [own.operator.root])
    next_.write_bytes(signed)
    own.operator.targets = signed
    access = ("--server", own.ports["api"], "--token-file", str(own.layout.admin_token))
    ca = ("--ca", str(own.layout.ca / "ca.pem"))
    done = CliRunner().invoke(app, ["release", "publish", str(next_), "--archive", str(path), *access, *ca])
    assert done.exit_code == 0, done.output
    (found,) = [each for each in own.ask("GET", "/releases")["bundles"] if each["version"] == "2.0.0"]
    assert found["custom"] == built.custom == {
        "kind": "os", "name": "edge", "version": "2.0.0", "digest": built.custom["digest"],
        "compatible": ["board-7"], "arch": "x86_64",
    }  # fmt: skip
    assert (found["length"], found["sha256"]) == (built.length, built.sha256)
    assert "os/edge-2.0.0.bundle" in ctl(own, "releases", "list").stdout
    node = new_node(own)
    made = data(own, "node", "update-os", node.id, "--bundle", "os/edge-2.0.0.bundle", "--activation", "none")
    assert (made["name"], made["digest"]) == ("edge", built.custom["digest"])
    far = "https://mirror.example/os/edge-2.0.0.bundle"
    ctl(own, "node", "cancel-os", node.id)
    data(own, "node", "update-os", node.id, "--bundle", far, "--activation", "none")
    with node.http() as http:
        assert http.get("/v1/node/wanted").json()["lines"]["os"]["source"] == far


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "head"])
def test_what_is_no_whole_bundle_is_not_listed(tmp_path: Path, damage: str) -> None:
    path, _ = make_bundle(tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-1], "longer": whole + b"x", "empty": b"", "head": whole[:12]}[damage])
    (tmp_path / "targets.json").write_bytes(offline.first_targets(systems_later()))
    words = ["--targets", str(tmp_path / "targets.json"), "--out", str(tmp_path / "next.json")]
    done = CliRunner().invoke(app, ["release", "add", str(path), *words])
    assert done.exit_code == 2, done.output
    assert not (tmp_path / "next.json").exists()


def systems_later() -> Any:
    from tests.server.world import later

    return later(90)


MEASURE = """
import resource, sys
from pathlib import Path
from instar_server.ctl.main import app
from typer.testing import CliRunner

bundle, targets, out = sys.argv[1:]
done = CliRunner().invoke(app, ["release", "add", bundle, "--targets", targets, "--out", out])
assert done.exit_code == 0, done.output
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_large_bundle_is_added_in_little_memory(tmp_path: Path) -> None:
    """200 MB that cannot be made smaller, in a process of its own; against a small one."""
    peaks = []
    noise = random.Random(5).randbytes(8 << 20)
    for n, pieces in enumerate((1, 25)):
        folder = tmp_path / str(n)
        folder.mkdir()
        path = large_bundle(folder, noise, pieces)
        (folder / "targets.json").write_bytes(offline.first_targets(systems_later()))
        words = [str(path), str(folder / "targets.json"), str(folder / "next.json")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / p / "src") for p in ("node", "server")),
        }
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *words],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
        size = path.stat().st_size
        path.unlink()
    assert size > 200_000_000
    assert peaks[1] < peaks[0] + 16, peaks  # MiB


def large_bundle(folder: Path, noise: bytes, pieces: int) -> Path:
    """As `bundle build` makes it, but for the packing: frames are read by nobody here."""
    import hashlib

    from instar.trust.bundle import HEAD, LENGTH, MAGIC, Bundle, Chunk, Image

    chunks, at, size = [], 0, 0
    for n in range(pieces * len(noise) // 131_072):
        name = hashlib.sha256(b"%d" % n).hexdigest()
        chunks.append(Chunk(size, 131_072, name, at, 131_072))
        at, size = at + 131_072, size + 131_072
    kernel = Chunk(0, 4096, "0" * 64, at, 0)
    images = (Image("root", size, "0" * 64, tuple(chunks)), Image("kernel", 4096, "0" * 64, (kernel,)))
    manifest = Bundle("web", "1.1.0", ("board-7",), "x86_64", "", (), images).encode()
    path = folder / "web-1.1.0.bundle"
    with path.open("wb") as file:
        file.write(MAGIC + LENGTH.pack(len(manifest)) + manifest)
        for _ in range(pieces):
            file.write(noise)
    assert path.stat().st_size == HEAD + len(manifest) + pieces * len(noise)
    return path
