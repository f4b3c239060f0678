"""All courses: a service module's way, restarts, jobs."""

from __future__ import annotations

from typing import Any

from instar.core.journal import Progress
from instar.host.line import Line as Store
from instar.targets.module_store import retirement
from instar_lab import machine
from instar_lab.kills import killing
from instar_lab.kills.course import BEGUN_S, Course, unfetch, version_of
from instar_lab.kills.modules import BAD, BETTER, GOOD, MARK, MEMORY, marks
from instar_lab.kills.restarts import LocalAgent, LocalModule, RestartAgent, RestartModule
from instar_lab.kills.ward import ANSWER_S, FINAL, Ward

# --- the module's line


class Line(Course):
    """One wish, and the transaction that comes of it."""

    def __init__(self, ward: Ward) -> None:
        super().__init__(ward)
        self._before: list[str] = []
        self._origin = ""

    def wish(self) -> str:
        raise NotImplementedError

    def begin(self) -> None:
        self._before = [progress.begin.tx for progress in self.ward.journal()]
        self._origin = self.ward.memory.current()
        self.ward.want(self.wish())

    def mine(self) -> list[Progress]:
        return [progress for progress in self.ward.journal() if progress.begin.tx not in self._before]

    def ended(self) -> bool:
        mine = self.mine()
        return bool(mine) and mine[-1].finished

    def fault(self) -> str:
        now = version_of(self.ward.memory.current())
        return "" if now == self.wish() else f"{now or 'nothing'} runs, {self.wish()} is wanted"

    def last(self) -> str:
        return self.ward.overlap() or super().last()

    def outcome(self) -> str:
        ends = [p.state.value + (f" ({p.reason.code})" if p.reason else "") for p in self.mine()]
        return f"{version_of(self.ward.memory.current()) or 'none'} runs; {', '.join(ends) or 'retired'}"


class Install(Line):
    name, about = "module-install", f"a service module, that the node has not, to {GOOD}"

    def prepare(self) -> None:
        if self.ward.memory.current():
            self.ward.want("")
            machine.wait_for(
                lambda: not self.ward.memory.current() and not self.ward.fault(), "no module", BEGUN_S,
                self.ward.fault, 0.03,
            )  # fmt: skip
        unfetch(self.ward.memory, "")  # as on a node that never had it

    def wish(self) -> str:
        return GOOD


class Update(Line):
    name, about = "module-update", f"a service module from {GOOD} to {BETTER}, or back"

    def prepare(self) -> None:
        self.runs("")
        self._to = {GOOD: BETTER, BETTER: GOOD}[version_of(self.ward.memory.current())]
        unfetch(self.ward.memory, self._to)

    def wish(self) -> str:
        return self._to


class Worse(Line):
    name, about = "module-bad", f"a service module to {BAD}, which falls once it runs"

    def prepare(self) -> None:
        self.runs("")

    def wish(self) -> str:
        return BAD

    def fault(self) -> str:
        now = self.ward.memory.current()
        return "" if now == self._origin else f"{now or 'nothing'} runs, it was {self._origin}"


class Retire(Line):
    name, about = "module-retire", "a service module that nobody wants any more"

    def prepare(self) -> None:
        self.runs("")

    def wish(self) -> str:
        return ""

    def ended(self) -> bool:
        found = retirement(self.ward.layout.module(MEMORY))
        return not self.ward.memory.current() and found is not None and found.told

    def fault(self) -> str:
        found = retirement(self.ward.layout.module(MEMORY))
        if found is None or not found.told:
            return f"its retirement is not done: {found}"
        left = [name for name in self.ward.memory.names() if name == self._origin]
        return super().fault() or (f"{left} is left over" if left else "")


# --- jobs


class Job(Course):
    """A job that leaves a line in a file."""

    name, about = "job", "a job whose module the node has"
    seconds = 0.3

    def __init__(self, ward: Ward) -> None:
        super().__init__(ward)
        self._order, self._n = "", 0
        self._end: dict[str, Any] = {}

    def prepare(self) -> None:
        place = self.ward.layout.module(MARK).releases
        if not place.exists() or not list(place.iterdir()):
            self.ward.ended(self.order(0, 0.0))

    def order(self, n: int, seconds: float) -> str:
        args = {"file": str(self.ward.marks), "n": n, "seconds": seconds}
        return self.ward.order("/jobs", module=MARK, args=args)

    def begin(self) -> None:
        self._n = self.ward.number()
        self._order = self.order(self._n, self.seconds)

    def ended(self) -> bool:
        """By the node's own word: what the server concludes before it has that may give way to it."""
        row = self.ward.row(self._order)
        return row["state"] in FINAL and row["ok"] is not None

    def fault(self) -> str:
        row = self.ward.row(self._order)
        end = {name: row[name] for name in ("state", "ok", "code", "ended_at")}
        if self._end and end != self._end:
            return f"it had ended as {self._end}, now it is {end}"
        if not self.ended():
            return f"the job is {row['state']}"
        self._end = end
        return self.effect(row)

    def effect(self, row: dict[str, Any]) -> str:
        count = marks(self.ward.marks, self._n)
        if count > 1 or (row["ok"] and count != 1):
            return f"the job ran {count} times, its row says {row['state']}"
        return ""

    def last(self) -> str:
        return ""

    def outcome(self) -> str:
        row = self.ward.row(self._order)
        return f"{row['state']} {row['code']}".strip() + f", ran {marks(self.ward.marks, self._n)} times"


class Fetched(Job):
    name, about = "job-fetch", "a job whose module is fetched first"
    seconds = 0.0

    def prepare(self) -> None:
        unfetch(Store(self.ward.layout.module(MARK)), "")


class Cancelled(Job):
    name, about = "job-cancel", "a job that is cancelled while it runs"
    seconds = 5.0

    def begin(self) -> None:
        super().begin()
        node = self.ward.node  # a kill may come first; then what is left of it is cancelled
        machine.wait_for(
            lambda: marks(self.ward.marks, self._n) or killing.happened(node) or self.ended(),
            "a job that runs", BEGUN_S, every_s=0.02,
        )  # fmt: skip
        self.ward.client.post(f"/jobs/{self._order}/cancel", {})


class Asked(Job):
    name, about = "job-ask", "a job that asks a service module"

    def prepare(self) -> None:
        self.runs("")

    def begin(self) -> None:
        self._order = self.ward.order("/jobs", module=MEMORY, args={"add": 1000, "seconds": self.seconds})

    def effect(self, row: dict[str, Any]) -> str:
        return ""

    def last(self) -> str:
        """The effect is in the module's sum: once, or not at all when the row does not say ok."""
        row = self.ward.row(self._order)
        found = self.ward.ended(self.ward.order("/jobs", module=MEMORY, args={}, wait_s=ANSWER_S))
        if not found["ok"]:
            return f"the module does not answer: {found['code']}: {found['text']}"
        added = found["reply"]["sum"] - self.ward.sum
        self.ward.sum = found["reply"]["sum"]
        if added not in ((1000,) if row["ok"] else (0, 1000)):
            return f"the question added {added}, its row says {row['state']}"
        return ""

    def outcome(self) -> str:
        row = self.ward.row(self._order)
        return f"{row['state']} {row['code']}".strip()


COURSES: tuple[type[Course], ...] = (
    Install, Update, Worse, Retire,
    RestartModule, RestartAgent, LocalModule, LocalAgent,
    Job, Fetched, Cancelled, Asked,
)  # fmt: skip
