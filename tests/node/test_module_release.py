"""A service module's releases, through the real engine: first one, update, revert, retirement, and all that hinders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core import quarantine
from instar.core.errors import MachineError, ServerUnreachable
from instar.core.journal import Progress, Reason
from instar.engine.driver import drive
from instar.engine.journal import Journal
from instar.engine.target import NotNow
from instar.host import points, trials
from instar.host.records import read_quarantine
from instar.targets import module_store
from instar.targets.kit import Verdict
from tests.node.modules import LINE, NAME, ModuleNode, build
from tests.node.world import WAIT, Built, Quiet


class Kill(BaseException):
    pass


@pytest.fixture
def node(folder: Path) -> Iterator[ModuleNode]:
    made = ModuleNode(folder / "state")
    yield made
    made.close()


@pytest.fixture
def updated(node: ModuleNode) -> ModuleNode:
    """On 1.0.0, with 1.1.0 on offer."""
    node.install(node.first)
    node.server.offer(node.second)
    return node


def run(
    node: ModuleNode, built: Built | None = None, journal: Journal | None = None, **begin: Any
) -> Progress:
    node.boot()
    return drive(journal or node.begin_module(built or node.first, **begin), node.module_target(), Quiet())


def settled(node: ModuleNode, release: Built | None, previous: Built | None = None) -> None:
    """The disk is in order, and the agent runs what it names."""
    name = release.name if release else ""
    assert node.module.current() == node.running == name
    # Without a release before, a revert lets `previous` name the same as `current`: nothing to go back to.
    assert node.module.previous() in ((previous.name,) if previous else ("", name))
    if release is not None:
        node.module.check(name)
    assert trials.read(node.module) is None
    assert list(node.layout.staging.iterdir()) == []
    assert node.journals.unfinished() == []


def kept_out(node: ModuleNode, built: Built) -> quarantine.Entry | None:
    return read_quarantine(node.layout.quarantine).get(quarantine.key(LINE, built.release.digest))


def serve(node: ModuleNode, built: Built) -> Built:
    node.server.offer(built)
    return built


# --- the good ways


def test_the_first_release_comes_out_of_nothing(node: ModuleNode) -> None:
    end = run(node)
    assert end.state.value == "confirmed", end.reason
    assert end.begin.origin == ""
    assert end.data["before"] == {"connected": True, "modules": {}}
    settled(node, node.first)
    assert node.reloads == [NAME]


def test_an_update_keeps_the_way_back(updated: ModuleNode) -> None:
    end = run(updated, updated.second)
    assert end.state.value == "confirmed", end.reason
    assert end.data["before"] == {"connected": True, "modules": {NAME: "ok"}}
    settled(updated, updated.second, updated.first)


def test_a_third_release_collects_nothing_that_was_used_today(updated: ModuleNode) -> None:
    run(updated, updated.second)
    third = serve(updated, build("1.2.0"))
    old = updated.module.folder(updated.first.name)
    run(updated, third, tx="tx-2")
    assert old.is_dir()
    hour_ago = updated.clock.wall() - 2 * module_store.DAY_S
    for name in updated.module.names():
        os.utime(updated.module.folder(name), (hour_ago, hour_ago))
    fourth = serve(updated, build("1.3.0"))
    run(updated, fourth, tx="tx-3")
    assert updated.module.names() == sorted([third.name, fourth.name])


def test_the_agent_that_is_away_starts_the_new_one_later(node: ModuleNode) -> None:
    """Its socket is gone while the link moves; it reads the links when it comes back."""

    def listen(point: str) -> None:
        if point == "activate:flipped":
            node.close()
            node.agent = None

    def back() -> None:
        if node.module.current() and node.agent is None:
            node.layout.socket("agent").unlink(missing_ok=True)
            node.boot()

    points.listener, node.clock.on_sleep = listen, back
    try:
        end = run(node)
    finally:
        points.listener = None
    assert end.state.value == "confirmed", end.reason
    assert node.reloads == []
    settled(node, node.first)


def test_an_agent_that_did_not_hear_is_told_again(node: ModuleNode) -> None:
    node.deaf = True

    def hear() -> None:
        node.deaf = len(node.reloads) < 1

    lease = 60.0
    node.clock.on_sleep = hear
    end = run(node)
    assert end.state.value == "confirmed", end.reason
    assert len(node.reloads) == 2
    assert node.clock.now < 1000.0 + lease


# --- what hinders


def fault(error: Exception) -> Callable[[ModuleNode], None]:
    return lambda node: setattr(node.server, "fault", error)


def verdict(word: str, code: str = "") -> Callable[[ModuleNode], None]:
    return lambda node: node.server.verdicts.update(trial=Verdict(word, Reason(code, "so it is")))


def signed(**custom: str) -> Callable[[ModuleNode], None]:
    return lambda node: node.server.signed.update(custom)


def served(text: str, **changes: Any) -> Callable[[ModuleNode], None]:
    return lambda node: node.server.offer(build("1.1.0", text, **changes))


def altered(node: ModuleNode) -> None:
    node.server.served.data = node.server.offered.archive[:-1] + b"x"


def loses_connection(node: ModuleNode) -> None:
    answer = node.said

    def said() -> Any:
        node.connected = node.running != node.server.offered.name
        return answer()

    node.said = said


RAISES = "def check(data): raise RuntimeError('no start')\n"
CODED = "def check(data):\n e = RuntimeError('no wasmtime here')\n e.code = 'no-wasmtime'\n raise e\n"

FAILURES: dict[str, tuple[Callable[[ModuleNode], object], str, bool]] = {
    "machine cannot": (fault(MachineError("no-space", "no")), "no-space", False),
    "bytes altered": (altered, "altered-blob", True),
    "another digest was signed": (signed(digest="0" * 96), "wish-differs", False),
    "another name was signed": (signed(name="demo.other"), "wish-differs", False),
    "another version was signed": (signed(version="9.9.9"), "wish-differs", False),
    "a node program was signed": (signed(kind="node"), "wish-differs", False),
    "it runs once only": (signed(mode="oneshot"), "not-a-service", False),
    "the archive is of another module": (served("x = 1\n", name="demo.other"), "altered-manifest", True),
    "what it depends on is not here": (served("x = 1\n", depends=["demo.base"]), "depends-absent", False),
    "its start fails": (served(RAISES), "module-failed", True),
    "this machine lacks something": (served(CODED), "no-wasmtime", False),
    "it falls on trial": (lambda n: n.falling.add(n.server.offered.name), "attempts-used-up", True),
    "server says no": (verdict("fail", "module-not-ok"), "module-not-ok", True),
    "server never says yes": (verdict("wait"), "lease-lapsed", True),
    "the agent loses its connection": (loses_connection, "lease-lapsed", True),
    "the agent knows no modules": (lambda n: setattr(n, "knows_modules", False), "agent-too-old", False),
}  # fmt: skip


@pytest.mark.parametrize("before", [True, False], ids=["update", "first"])
@pytest.mark.parametrize("failure", list(FAILURES))
def test_a_failure_ends_on_what_was_there_with_its_reason(
    node: ModuleNode, failure: str, before: bool
) -> None:
    spoil, code, blame = FAILURES[failure]
    if before:
        node.install(node.first)
    node.server.offer(node.second)
    spoil(node)
    offered = node.server.offered
    end = run(node, offered)
    assert end.state.value == "reverted"
    assert end.reason is not None
    assert end.reason.code == code, end.reason
    settled(node, node.first if before else None)
    assert not node.module.folder(offered.name).exists()
    entry = kept_out(node, offered)
    assert (entry is not None) is blame
    if entry is not None:
        assert entry.reason == end.reason


def test_the_reason_of_a_fall_is_the_modules_own(node: ModuleNode) -> None:
    node.falling.add(node.first.name)
    began = node.clock.now
    end = run(node)
    assert end.reason is not None
    assert "module demo.watch is failed: it raised OSError" in end.reason.text
    assert node.clock.now - began < 2.0, "it need not wait for the lease"


def test_only_its_own_health_counts(updated: ModuleNode) -> None:
    updated.others = {"demo.base": "ok"}
    updated.boot()
    answer = updated.said

    def said() -> Any:
        if updated.running == updated.second.name:
            updated.others = {"demo.base": "failed"}
        return answer()

    updated.said = said
    assert run(updated, updated.second).state.value == "confirmed"


def test_an_agent_that_stays_silent_is_not_the_modules_fault(updated: ModuleNode) -> None:
    def listen(point: str) -> None:
        if point == "activate:flipped":
            updated.said = lambda: None

    points.listener = listen
    try:
        end = run(updated, updated.second)
    finally:
        points.listener = None
    assert end.reason is not None
    assert end.reason.code == "lease-lapsed"
    assert updated.module.current() == updated.first.name
    assert kept_out(updated, updated.second) is None


def test_a_silent_server_stretches_the_trial(updated: ModuleNode) -> None:
    def listen(point: str) -> None:
        if point == "activate:flipped":
            updated.server.fault = ServerUnreachable("server-unreachable", "no route")

    points.listener = listen
    try:
        end = run(updated, updated.second)
    finally:
        points.listener = None
    assert end.reason is not None
    assert end.reason.code == "unconfirmed"
    settled(updated, updated.first, updated.first)
    assert kept_out(updated, updated.second) is None


def test_a_revert_is_not_at_rest_before_a_living_agent_has_heard_of_it(updated: ModuleNode) -> None:
    updated.server.verdicts["trial"] = Verdict("fail", Reason("wrong", "it is"))
    updated.record("agent", "")
    answer, journal = updated.said, updated.begin_module(updated.second)

    def listen(point: str) -> None:
        if point == "revert:flipped":
            updated.said = lambda: b"\n"

    points.listener = listen
    try:
        with pytest.raises(NotNow):
            run(updated, journal=journal)
    finally:
        points.listener = None
    assert updated.running == updated.second.name
    updated.said = answer
    assert run(updated, journal=journal).state.value == "reverted"
    settled(updated, updated.first, updated.first)


def test_a_revert_to_a_damaged_release_leaves_none_running(updated: ModuleNode) -> None:
    updated.server.verdicts["trial"] = Verdict("fail", Reason("wrong", "it is"))

    def listen(point: str) -> None:
        if point == "activate:flipped":
            file = updated.module.folder(updated.first.name) / "main.py"
            file.write_bytes(b"evil")

    points.listener = listen
    try:
        end = run(updated, updated.second)
    finally:
        points.listener = None
    assert end.state.value == "reverted"
    settled(updated, None)


def test_a_slow_module_gets_a_trial_that_is_long_enough(node: ModuleNode) -> None:
    slow = serve(node, build("1.0.0", timeouts={"ready_s": 100.0}))
    journal = node.begin_module(slow)
    node.server.verdicts["trial"] = WAIT
    spent: list[float] = []
    node.clock.on_sleep = lambda: spent.append(node.clock.now)
    end = run(node, journal=journal)
    assert end.reason is not None
    assert end.reason.code == "lease-lapsed"
    assert spent[-1] - spent[0] >= 130.0


# --- the rehearsal


def test_the_rehearsal_gets_a_copy_of_the_data_and_leaves_the_original_alone(node: ModuleNode) -> None:
    text = (
        "def check(data):\n"
        "    assert (data / 'state.json').read_text() == '{\"seen\": 1}', 'another state'\n"
        "    assert sorted(p.name for p in data.rglob('*')) == ['deep', 'state.json', 'sub'], list(data.rglob('*'))\n"
        "    (data / 'state.json').write_text('spoiled')\n"
    )
    built = serve(node, build("1.0.0", text))
    data = node.keep()
    (data / "link").symlink_to("/etc/passwd")
    (data / "sub").mkdir()
    (data / "sub" / "deep").write_bytes(b"x")
    os.mkfifo(data / "pipe")
    end = run(node, built)
    assert end.state.value == "confirmed", end.reason
    assert (data / "state.json").read_text() == '{"seen": 1}'
    first, again = node.checks
    assert first == again, "the question is put until it is answered"
    assert first["within_s"] == pytest.approx(node.settings.rehearsal.within_s + 0.4)


def test_an_agent_that_is_away_is_waited_for_before_anything_is_switched(node: ModuleNode) -> None:
    journal = node.begin_module(node.first)
    for _ in range(5):
        with pytest.raises(NotNow, match=r"cannot rehearse demo\.watch: cannot ask agent\.sock"):
            drive(journal, node.module_target(), Quiet())
        assert node.module.current() == ""
    assert list((node.layout.staging / "tx-1").iterdir()) == []
    assert run(node, journal=journal).state.value == "confirmed"


# --- the way back


def test_a_rollback_needs_no_server(updated: ModuleNode) -> None:
    run(updated, updated.second)
    updated.server.fault = ServerUnreachable("server-unreachable", "no route")
    end = run(updated, updated.first, tx="tx-2", cause="rollback")
    assert end.state.value == "confirmed", end.reason
    settled(updated, updated.first, updated.second)
    entry = kept_out(updated, updated.second)
    assert entry is not None
    assert entry.reason.code == "rolled-back"


def test_a_rollback_to_a_release_that_falls_comes_forward_again(updated: ModuleNode) -> None:
    run(updated, updated.second)
    updated.falling.add(updated.first.name)
    end = run(updated, updated.first, tx="tx-2", cause="rollback")
    assert end.state.value == "reverted"
    settled(updated, updated.second, updated.first)
