"""A service module's releases, through the real engine: first one, update, revert, retirement, and all that hinders."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instar.core import quarantine
from instar.core.errors import MachineError, ServerUnreachable
from instar.core.journal import Progress, Reason
from instar.core.trial import Lease
from instar.engine.driver import drive
from instar.engine.journal import Journal, Journals
from instar.engine.target import NotNow
from instar.host import points, trials
from instar.host.processes import start_time
from instar.host.records import read_quarantine
from instar.targets import module_store
from instar.targets.kit import Verdict
from instar.updater.targets import Targets
from instar.updater.tidy import tidy
from tests.node.modules import GOOD, LINE, NAME, ModuleNode, build, runner
from tests.node.world import WAIT, Built, Quiet, put


class Kill(BaseException):
    pass


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runner(tmp_path_factory.mktemp("runner") / "instar.pyz")


@pytest.fixture
def node(folder: Path, program: Path) -> Iterator[ModuleNode]:
    made = ModuleNode(folder / "state", program)
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


RAISES = "def check(request): raise RuntimeError('no start')\n"
FALLS = "import atexit, os\natexit.register(os._exit, 3)\n" + GOOD
CODED = "def check(request):\n e = RuntimeError('no wasmtime here')\n e.code = 'no-wasmtime'\n raise e\n"

FAILURES: dict[str, tuple[Callable[[ModuleNode], object], str, bool]] = {
    "machine cannot": (fault(MachineError("no-space", "no")), "no-space", False),
    "bytes altered": (altered, "altered-blob", True),
    "another digest was signed": (signed(digest="0" * 96), "wish-differs", False),
    "another name was signed": (signed(name="demo.other"), "wish-differs", False),
    "another version was signed": (signed(version="9.9.9"), "wish-differs", False),
    "a node program was signed": (signed(kind="node"), "wish-differs", False),
    "it runs once only": (signed(mode="oneshot"), "not-a-service", False),
    "the archive is of another module": (served("x = 1\n", name="demo.other"), "altered-manifest", True),
    "it is for another machine": (served(RAISES, entry={"pdp11": "main.py"}), "wrong-machine", True),
    "what it depends on is not here": (served("x = 1\n", depends=["demo.base"]), "depends-absent", False),
    "its start fails": (served(RAISES), "module-failed", True),
    "this machine lacks something": (served(CODED), "no-wasmtime", False),
    "its start ends the process": (served("import os; os.abort()\n"), "rehearsal-failed", True),
    "its start hangs": (served("import time; time.sleep(60)\n"), "rehearsal-failed", True),
    "it answers, and then fails": (served(FALLS), "rehearsal-failed", True),
    "it talks without end": (served("import os\nwhile True: os.write(3, b'x' * 60000)\n"), "too-much-output", True),
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
        "import json, os\n"
        "def check(request):\n"
        "    path = os.path.join(request['data'], 'state.json')\n"
        "    assert json.load(open(path)) == {'seen': 1}, 'another state'\n"
        "    open(path, 'w').write('spoiled')\n"
        "    assert os.getcwd() == request['data'] == os.environ['HOME'], os.getcwd()\n"
        "    assert sorted(os.environ) == ['HOME', 'INSTAR_MODULE', 'LANG', 'PATH', 'PWD', 'TMPDIR'], sorted(os.environ)\n"
        "    assert not os.path.exists('link') and os.path.isdir('sub')\n"
        "    assert sorted(os.listdir('/proc/self/fd'))[:4] == ['0', '1', '2', '3']\n"
        "    assert os.getsid(0) == os.getpid()\n"
        "    return {}\n"
    )
    built = serve(node, build("1.0.0", text))
    data = node.keep()
    (data / "link").symlink_to("/etc/passwd")
    (data / "sub").mkdir()
    end = run(node, built)
    assert end.state.value == "confirmed", end.reason
    assert (data / "state.json").read_text() == '{"seen": 1}'


def test_nothing_of_a_rehearsal_is_left(node: ModuleNode, folder: Path) -> None:
    """Children in sessions of their own, started before a start that hangs."""
    pids = folder / "pids"
    text = (
        "import os, time\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        f"            open({str(pids)!r}, 'a').write(str(os.getpid()) + '\\n')\n"
        "            time.sleep(600)\n"
        "        os._exit(0)\n"
        "time.sleep(600)\n"
    )
    built = serve(node, build("1.0.0", text))
    end = run(node, built)
    assert end.reason is not None
    assert "did not end within" in end.reason.text
    left = [int(pid) for pid in pids.read_text().split()]
    assert len(left) == 3
    limit = time.monotonic() + 5.0
    while any(start_time(pid) for pid in left) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not any(start_time(pid) for pid in left)


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


# --- the end of a module


def test_a_retired_module_is_gone_but_for_its_data(updated: ModuleNode) -> None:
    updated.boot()
    data = updated.keep()
    updated.module_target().retire()
    settled(updated, None)
    assert updated.module.names() == []
    assert (data / "state.json").exists()
    assert updated.reloads == [NAME]
    updated.module_target().retire()
    assert updated.reloads == [NAME], "doing it again does nothing"


def test_the_data_waits_thirty_days_of_the_machines_own_time(node: ModuleNode) -> None:
    node.install(node.first)
    node.boot()
    data = node.keep()
    target = node.module_target()
    target.retire()
    for _ in range(29):
        node.clock.now += module_store.DAY_S
        target.sweep()
    assert data.is_dir()
    node.clock.reboot()
    target.sweep()
    node.clock.now += module_store.DAY_S / 2
    target.sweep()
    assert data.is_dir(), "a clock that leaps costs nothing; only time that was seen to pass counts"
    node.clock.now += module_store.DAY_S
    target.sweep()
    assert not data.exists()
    assert not node.layout.module(NAME).retired.exists()


def test_a_module_that_is_wanted_again_finds_its_data(node: ModuleNode) -> None:
    node.install(node.first)
    node.boot()
    node.keep()
    node.module_target().retire()
    assert run(node).state.value == "confirmed"
    assert not node.layout.module(NAME).retired.exists()
    node.clock.now += 40 * module_store.DAY_S
    node.module_target().sweep()
    assert (node.layout.module(NAME).data / "state.json").exists()
    settled(node, node.first)


def test_data_of_a_first_release_that_failed_waits_too(node: ModuleNode) -> None:
    node.keep()
    node.falling.add(node.first.name)
    run(node)
    assert module_store.retirement(node.layout.module(NAME)) is not None


def test_an_unreadable_record_keeps_everything(node: ModuleNode) -> None:
    node.boot()
    data = node.keep()
    node.layout.module(NAME).retired.write_bytes(b"{")
    node.module_target().sweep()
    assert data.is_dir()
    assert json.loads(node.layout.module(NAME).retired.read_bytes())["told"] is True


def test_a_retirement_that_the_agent_did_not_hear_of_is_told_at_the_next_round(node: ModuleNode) -> None:
    node.install(node.first)
    node.boot()
    node.record("agent", "")
    answer, node.said = node.said, lambda: b"\n"
    with pytest.raises(MachineError):
        node.module_target().retire()
    assert node.running == node.first.name
    node.said = answer
    node.module_target().sweep()
    settled(node, None)


# --- kills


def kill_at(arrival: int) -> Callable[[str], None]:
    left = arrival

    def listen(_: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Kill

    return listen


CASES = ["first", "first bad", "update", "update bad", "rollback", "retire"]


@pytest.mark.parametrize("again", [0, 3], ids=["once", "twice"])
@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_it_comes_to_its_end(folder: Path, program: Path, case: str, again: int) -> None:
    """Killed at each arrival at a named point, and in recovery once more; then as without the kill."""
    for arrival in itertools.count(1):
        node = ModuleNode(folder / str(arrival), program)
        if case != "first" and case != "first bad":
            node.install(node.first, node.second if case == "rollback" else None)
            node.server.offer(node.second)
        if case.endswith("bad"):
            node.server.verdicts["trial"] = Verdict("fail", Reason("wrong", "it is"))
        do = {"retire": retire, "rollback": go_back}.get(case, go)
        killed = [attempt(node, do, kill_at(number)) for number in (arrival, again) if number]
        attempt(node, do, None)
        old, new = (None if case.startswith("first") else node.first), node.server.offered
        if case == "retire":
            settled(node, None)
        elif case.endswith("bad"):
            settled(node, old, old)
        elif case == "rollback":
            settled(node, node.second, node.first)
        else:
            settled(node, new, old)
        node.close()
        if not killed[0]:
            assert arrival > 4, "there is hardly a point to be killed at"
            return


def attempt(node: ModuleNode, do: Callable[[ModuleNode], None], listen: Callable[[str], None] | None) -> bool:
    """Whether it was killed."""
    points.listener = listen
    try:
        do(node)
    except Kill:
        return True
    finally:
        points.listener = None
    return False


def go(node: ModuleNode) -> None:
    node.boot()
    opened = node.journals.open_all()
    journal = opened[0] if opened else node.begin_module(node.server.offered)
    drive(journal, node.module_target(), Quiet())


def go_back(node: ModuleNode) -> None:
    node.boot()
    opened = node.journals.open_all()
    drive(
        opened[0] if opened else node.begin_module(node.second, cause="rollback"),
        node.module_target(),
        Quiet(),
    )


def retire(node: ModuleNode) -> None:
    node.boot()
    node.module_target().sweep()
    if node.module.current():
        node.module_target().retire()


def test_a_trial_that_lost_its_journal_is_undone_to_nothing(node: ModuleNode) -> None:
    node.install(node.first)
    node.boot()
    lease = Lease(2.0, 20.0, node.clock.boot_id(), node.clock.now)
    trials.write(node.module, trials.Trial("tx-lost", node.first.name, "", 3, lease))
    tidy(node.layout, Journals(node.layout.journal, node.clock), Targets(node.kit()))
    assert node.module.current() == node.running == ""
    assert trials.read(node.module) is None


def test_collecting_keeps_what_a_job_may_use(node: ModuleNode) -> None:
    """A one-shot module has no links: the newest two stay, and what was used today; all of it goes after a month."""
    layout, line = node.layout.module(NAME), node.module
    layout.releases.mkdir(parents=True)
    builts = [build(f"1.{n}.0") for n in range(4)]
    now = 2_000_000_000.0
    for age, built in zip((40.0, 0.5, 40.0, 20.0), builts, strict=True):
        put(line, built)
        then = now - age * module_store.DAY_S
        os.utime(line.folder(built.name), (then, then))
    module_store.collect(line, layout, now)
    assert line.names() == [built.name for built in builts[1:]]
    module_store.collect(line, layout, now + 10.5 * module_store.DAY_S)
    assert line.names() == [built.name for built in builts[2:]], "used today no more"
    module_store.collect(line, layout, now + 11 * module_store.DAY_S)
    assert line.names() == []
