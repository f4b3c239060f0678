"""Documents that are made from the code: `python -m instar_lab.docs` writes them, a test compares them."""

from __future__ import annotations

from pathlib import Path

from instar.core import commands, lifecycle
from instar.core.transaction import DEADLINE_S, FINAL, LONGER_S, MOST_TRIES, STEP, TABLE, Event, State, Step

ROOT = Path(__file__).resolve().parents[3]
TRANSACTION = ROOT / "docs" / "transaction.md"
LIFECYCLE = ROOT / "docs" / "modules-lifecycle.md"

MEANING = {
    State.OFFERED: "wanted; nothing of it is on the disk",
    State.STAGED: "its bytes are on the disk, out of the way of everything",
    State.VERIFIED: "in its final place, each file as signed, marked valid",
    State.REHEARSED: "ran from its final place; it and the server say that it works",
    State.TRIAL: "it is what runs, on a lease",
    State.CONFIRMING: "decided for good, forwards",
    State.CONFIRMED: "the end: it stays",
    State.REVERTING: "decided for good, backwards",
    State.REVERTED: "the end: what ran before runs again",
}

OWN_BOUND = {Step.REHEARSE: "`rehearsal.within_s`", Step.WATCH: "the trial's lease"}

INTRO = """\
# The transaction

Made from `instar.core.transaction` by `python -m instar_lab.docs`; a test compares the two.

Whatever gets replaced goes through these states, and through no others. Each state owes one step. A step
is idempotent: the intent is written to the journal before it and the outcome after it, both synced, so a
kill anywhere is answered by doing the step again. A passing fault (the server is silent, busy, or its
metadata is stale) is no outcome: the step is tried again later.

"""


def transaction() -> str:
    """The text of docs/transaction.md."""
    parts = [INTRO, "```mermaid\nstateDiagram-v2\n", "  [*] --> offered\n"]
    for (state, event), after in TABLE.items():
        if state is not after:
            verb = STEP[state].value if event is Event.DONE else f"{STEP[state].value} failed"
            parts.append(f"  {state.value} --> {after.value}: {verb}\n")
    parts += [f"  {state.value} --> [*]\n" for state in State if state in FINAL]
    parts.append(
        "```\n\n| state | means | owes | done leads to | failed leads to | tries | seconds a try |\n"
    )
    parts.append("|---|---|---|---|---|---|---|\n")
    parts += [_row(state) for state in State]
    return "".join(parts)


def _row(state: State) -> str:
    step = STEP.get(state)
    if step is None:
        return f"| {state.value} | {MEANING[state]} | – | – | – | – | – |\n"
    done, failed = TABLE[state, Event.DONE].value, TABLE[state, Event.FAILED].value
    tries = str(MOST_TRIES.get(step, "until it is done" if step in DEADLINE_S else "–"))
    seconds = f"{DEADLINE_S[step]:g}" if step in DEADLINE_S else OWN_BOUND[step]
    longer = [f"{most:g} for line {line}" for (line, each), most in LONGER_S.items() if each is step]
    seconds = ", ".join([seconds, *longer])
    return f"| {state.value} | {MEANING[state]} | {step.value} | {done} | {failed} | {tries} | {seconds} |\n"


L = lifecycle.State
LIFE = {
    L.ABSENT: "nothing of it runs; what it depends on may not be there yet",
    L.STARTING: "its process is being made, or has not said that it is ready",
    L.READY: "it said that it is ready, and is well",
    L.UNWELL: "it runs, and says itself that it is not well",
    L.FAILED: "it fell, or could not be started; it is tried again after a wait",
    L.RETRYING: "started again after it failed",
    L.PROVING: "ready after it failed: it must stay so for a while before it counts",
    L.STOP_ASKED: "told to stop; an operation may still be under way",
    L.READY_TO_STOP: "nothing is under way and its state is saved; its process may end",
    L.STOPPED: "it ended as it was told to",
    L.KILLED: "it did not end in time, and was ended",
}

HAPPENS = {
    lifecycle.Event.START: "what it depends on is ready, and its wait is over",
    lifecycle.Event.BLOCKED: "what it depends on is missing, has failed, or depends on it",
    lifecycle.Event.READY: "it says that it is ready",
    lifecycle.Event.UNWELL: "it says that it is not well",
    lifecycle.Event.WELL: "it says that it is well again",
    lifecycle.Event.STEADY: f"it has stayed ready for {lifecycle.PROVE_S:g} s",
    lifecycle.Event.ENDED: "its process is gone",
    lifecycle.Event.LATE: "a bound has passed; its process is killed",
    lifecycle.Event.STOP: "it is told to stop",
    lifecycle.Event.SAVED: "it says that it may be stopped",
    lifecycle.Event.RETIRED: "this node is not to have it any more",
}

LIFE_INTRO = """\
# Service modules and restarts

Made from `instar.core.lifecycle` and `instar.core.commands` by `python -m instar_lab.docs`; a test compares
them.

## The life of a service module

The agent keeps each service module's process running. What a module says on its control line at a time when
it means nothing changes nothing. A process that ends although nobody told it to has failed, whatever its exit
status was. The wait before the next try begins with {floor:g} s and grows to {cap:g} s; once a module has been
ready for {steady:g} s, its next failure waits as the first one did.

What a module depends on is started before it and stopped after it. A restart of one takes along what depends
on it; a fall does not.

"""

COMMANDS_INTRO = """
## Commands

A restart, from the server or from `instar restart`, is a command. It is on the node's disk before anybody is
told that it was taken, and commands are done one after the other in the order of arrival. `in-progress` is on
the disk before anything is stopped. The final status is sent until the server has acknowledged it, and the
newest 256 are remembered, so that a command that comes again is not done again.

"""

BOUNDS_TEXT = """
A restart is bounded as a whole (`within_s`, {low:g} to {high:g} s, 30 s unless it says otherwise). Up to two
thirds of that are for stopping: each module has its own `stop_s` at most, then it is killed and that is
logged. The rest is for starting again and for seeing that it runs. Past the bound the status is `timeout`, and
what was killed is started all the same.

For a restart of the agent, a child of the agent (`instar cycle`) asks whoever keeps the agent running to
restart it, and the agent goes on until it is stopped. When nobody does that within 10 s, the agent replaces
itself by the launcher.

What the next agent does with a command that it finds in progress:

| type | it is |
|---|---|
"""


def modules_lifecycle() -> str:
    """The text of docs/modules-lifecycle.md."""
    floor, _, cap = lifecycle.BACKOFF
    parts = [LIFE_INTRO.format(floor=floor, cap=cap, steady=lifecycle.STEADY_S)]
    life = {(s.value, e.value): then.value for (s, e), then in lifecycle.TABLE.items()}
    parts += _diagram(life, [L.ABSENT.value], [])
    parts.append("| state | means | shown as | bound |\n|---|---|---|---|\n")
    for state in L:
        bound = lifecycle.BOUND.get(state, "–").replace("`PROVE_S`", f"{lifecycle.PROVE_S:g} s")
        parts.append(f"| {state.value} | {LIFE[state]} | {lifecycle.SHOWN[state]} | {bound} |\n")
    parts.append("\n| event | happens when |\n|---|---|\n")
    parts += [f"| {event.value} | {HAPPENS[event]} |\n" for event in lifecycle.Event]
    parts.append(COMMANDS_INTRO)
    table = {(s.value, e.value): then.value for (s, e), then in commands.TABLE.items()}
    parts += _diagram(table, ["pending"], [s.value for s in commands.Status if s in commands.FINAL])
    low, high = commands.WITHIN_S
    parts.append(BOUNDS_TEXT.format(low=low, high=high).removeprefix("\n"))
    parts += [f"| `{kind}` | {words} |\n" for kind, words in commands.RESUMED.items()]
    return "".join(parts)


def _diagram(table: dict[tuple[str, str], str], first: list[str], final: list[str]) -> list[str]:
    """The lines of a diagram; a name of several words loses its hyphens, which the drawing has no room for."""
    parts = ["```mermaid\nstateDiagram-v2\n"]
    parts += [f"  [*] --> {_id(state)}\n" for state in first]
    parts += [f"  {_id(state)} --> {_id(then)}: {event}\n" for (state, event), then in table.items()]
    parts += [f"  {_id(state)} --> [*]\n" for state in final]
    return [*parts, "```\n\n"]


def _id(state: str) -> str:
    return state.replace("-", "_")


def main() -> None:
    TRANSACTION.write_text(transaction())
    LIFECYCLE.write_text(modules_lifecycle())


if __name__ == "__main__":
    main()
