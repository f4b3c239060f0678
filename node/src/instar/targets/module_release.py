"""A service module's releases. The agent runs them; the updater moves the link and tells it so.

What differs from the node's program: there may be nothing before the first release, and nothing after the
last; the agent alone rehearses it; and no launcher counts starts, so the watch does, and ends a trial early when
the module has fallen too often.
"""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import Any

from instar.core.errors import InputError, InstarError, MachineError, ReleaseError
from instar.core.journal import Progress, Reason
from instar.core.modules import line_of
from instar.core.releases import Release
from instar.core.trial import read_health
from instar.engine.target import Failed, Notes, Outcome
from instar.host import processes, trials
from instar.host.files import make_folder
from instar.host.line import MANIFEST, Line
from instar.host.points import reach
from instar.host.sockets import ask
from instar.targets import module_store, rehearsal
from instar.targets.contents import ModuleContents
from instar.targets.kit import Kit, TrustedTarget
from instar.targets.line import HEALTH_WAIT_S, LOCK_WAIT_S, LineTarget
from instar.targets.watching import Watch, ask_agent
from instar.trust.module import ModuleManifest

RELOAD_S = 40.0  # for the agent to stop the old one, which takes it 30 s at the most
REMIND_S = 5.0  # how often an agent that runs another release than `current` is told again
SPARE_S = 30.0  # of a trial, beside the module's own time to get ready and the hold


class ModuleRelease(LineTarget):
    """`name` must have been checked: it is a folder's name."""

    def __init__(self, kit: Kit, name: str) -> None:
        self.name, self.layout = name, kit.layout.module(name)
        super().__init__(kit, line_of(name), Line(self.layout, kit.disk), ModuleContents(name))

    def check_promise(self, progress: Progress, target: TrustedTarget) -> None:
        super().check_promise(progress, target)
        if (mode := target.custom.get("mode")) != "service":
            text = f"cannot keep {self.name} running: expected a service module, got mode {mode!r:.40}"
            raise InputError("not-a-service", text)

    def unpack(self, archive: Path, release: Release) -> None:
        with self._locked():  # a child that fetches the same release for a job takes it too
            super().unpack(archive, release)

    def rehearse(self, progress: Progress, notes: Notes) -> Outcome:
        begin = progress.begin
        if begin.cause == "rollback":
            return Outcome()  # it ran here before
        manifest = self.manifest(begin.release.name)
        absent = [name for name in manifest.depends if not self._is_there(name)]
        if absent:
            text = f"{self.name} depends on {', '.join(absent)}, which this node does not run"
            raise Failed(Reason("depends-absent", text), blame=False)
        # A name of its own for each try: what a killed one left under way must not be taken for this one.
        scratch = self._staging(progress) / f"rehearsal-{uuid.uuid4().hex[:8]}"
        make_folder(scratch.parent, 0o700, self.kit.disk)
        reach("rehearse:run")
        seconds = rehearsal.rehearse(self.kit, manifest, begin.digest, self.layout.data, scratch)
        return Outcome({"rehearsed_s": round(seconds, 3)})

    def activate(self, progress: Progress, notes: Notes) -> Outcome:
        module_store.forget_retirement(self.layout, self.kit.disk)  # a half done one must not undo this
        reach("activate:wanted")
        return super().activate(progress, notes)

    def watch(self, progress: Progress, notes: Notes) -> Outcome:
        looks = _Looks(self, progress)
        try:
            Watch(self, progress, notes).run(looks.answer)
        except Failed as failed:
            if looks.agent_is_silent:  # nobody ran it, so it has shown nothing
                raise Failed(failed.reason, blame=False) from None
            raise
        return Outcome()

    def revert(self, progress: Progress, notes: Notes) -> Outcome:
        outcome = super().revert(progress, notes)
        if not self.line.current() and self.layout.data.is_dir() and not self.layout.retired.exists():
            module_store.note_retirement(self.layout, progress.begin.release.name, self.kit, told=True)
        return outcome

    # --- how it is put in place

    def put_back(self, origin: str, fallback: str) -> None:
        """As for the node's program, but where there is no good release to go back to, none runs."""
        if self.line.is_valid(origin):
            self.line.activate(origin, fallback)
        else:
            self.line.deactivate()

    def bring_up(self, release: str) -> None:
        """Tell the agent. One that is away reads the links when it starts; one that does not answer is
        told again by the watch."""
        with contextlib.suppress(InstarError):
            self._tell_agent()

    def bring_back(self, release: str) -> None:
        """Tell the agent, and do not rest before it has heard it: the release that failed must not go on."""
        try:
            self._tell_agent()
        except MachineError:
            process = processes.recorded(self.kit.layout.process("agent"))
            if process is not None and processes.alive(process, self.kit.clock.boot_id()):
                raise
        except InputError:
            return  # it has heard, and has its own trouble with what is there

    def collect(self) -> None:
        with self._locked():
            module_store.collect(self.line, self.layout, self.kit.clock.wall())

    def undo_orphan(self, trial: trials.Trial, reason: Reason) -> None:
        super().undo_orphan(trial, reason)
        if self.line.current() == trial.release:
            self.put_back(trial.previous, "")

    def retire(self) -> None:
        """End the module: nobody wants it any more. Idempotent, and killed anywhere is done again."""
        module_store.retire(self.line, self.layout, self.kit, lambda: self.bring_back(""), LOCK_WAIT_S)

    def sweep(self) -> None:
        """Idempotent, and cheap when there is nothing to do."""
        found = module_store.retirement(self.layout)
        if found is not None and not found.told:
            self.retire()
        module_store.sweep(self.line, self.layout, self.kit)

    def _tell_agent(self) -> None:
        socket = self.kit.layout.socket("agent")
        ask(socket, {"do": "reload-module", "module": self.name}, RELOAD_S)

    # --- what is known of it

    def manifest(self, release: str) -> ModuleManifest:
        """Raises ReleaseError `release-damaged`."""
        try:
            return ModuleManifest.decode((self.line.folder(release) / MANIFEST).read_bytes())
        except (OSError, InputError) as error:
            text = f"cannot use {release} of {self.name}: {error}"
            raise ReleaseError("release-damaged", text) from None

    def least_lease_s(self, progress: Progress) -> float:
        timeouts = self.manifest(progress.begin.release.name).timeouts
        return timeouts.ready_s + self.kit.settings.trial.hold_s + SPARE_S

    def health_before(self) -> dict[str, object]:
        """Its own state and the agent's connection. Raises Failed for an agent that runs no modules yet."""
        try:
            said = ask(self.kit.layout.socket("agent"), {"do": "health"}, HEALTH_WAIT_S)
        except InstarError:
            return {"connected": False, "modules": {}}
        if not isinstance(said.get("digests"), dict):
            text = "the agent is of a release that runs no modules yet"
            raise Failed(Reason("agent-too-old", text), blame=False)
        health = read_health(said)
        own = {name: state for name, state in health.modules.items() if name == self.name}
        return {"connected": health.connected, "modules": own}

    def _is_there(self, name: str) -> bool:
        return bool(Line(self.kit.layout.module(name), self.kit.disk).current())


class _Looks:
    """What the agent says of one module on trial, look after look."""

    def __init__(self, target: ModuleRelease, progress: Progress) -> None:
        self._target, self._name, self._progress = target, target.name, progress
        self.agent_is_silent = True
        self._told_at = target.kit.clock.boottime()
        self._restarts: int | None = None  # as they were first seen

    def answer(self, kit: Kit) -> dict[str, Any]:
        """For the watch: the module's own pid, digest and state. Raises ReleaseError while it is not well,
        Failed when it has fallen too often, MachineError while the agent is silent."""
        self.agent_is_silent = True
        said = ask_agent(kit)
        self.agent_is_silent = False
        digest = str(_of(said, "digests").get(self._name, ""))
        state = str(_of(said, "modules").get(self._name, "absent"))
        if digest != self._progress.begin.digest:
            self._remind()
        elif state != "ok":
            self._not_well(kit, state)
        pid = _of(said, "pids").get(self._name) or said.get("pid", 0)
        own = {self._name: state} if digest else {}
        return {"pid": pid, "digest": digest, "connected": said.get("connected"), "modules": own}

    def _remind(self) -> None:
        """The agent does not run what `current` names: it was away, or busy, when it was told."""
        now = self._target.kit.clock.boottime()
        if now - self._told_at >= REMIND_S:
            self._told_at = now
            self._target.bring_up("")

    def _not_well(self, kit: Kit, state: str) -> None:
        restarts, error = self._told_by_agent(kit) if state == "failed" else (0, "")
        why = f"module {self._name} is {state}" + (f": {error}" if error else "")
        if state == "failed":
            self._restarts = restarts if self._restarts is None else self._restarts
            if restarts - self._restarts >= kit.settings.trial.attempts:
                raise Failed(Reason("attempts-used-up", f"it fell {restarts} times: {why}"))
        raise ReleaseError("module-not-ok", why)

    def _told_by_agent(self, kit: Kit) -> tuple[int, str]:
        """How often the agent started it again, and why it had to."""
        try:
            rows = ask(kit.layout.socket("agent"), {"do": "modules"}, HEALTH_WAIT_S).get("modules")
            row = next(row for row in rows or [] if row["name"] == self._name)
            return int(row["restarts"]), str(row["error"])[:300]
        except (InstarError, StopIteration, KeyError, TypeError, ValueError):
            return 0, ""


def _of(said: dict[str, Any], name: str) -> dict[str, Any]:
    value = said.get(name)
    return value if isinstance(value, dict) else {}
