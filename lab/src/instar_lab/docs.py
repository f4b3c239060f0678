"""Documents that are made from the code: `python -m instar_lab.docs` writes them, a test compares them."""

from __future__ import annotations

from pathlib import Path

from instar.core.transaction import DEADLINE_S, FINAL, MOST_TRIES, STEP, TABLE, Event, State, Step

ROOT = Path(__file__).resolve().parents[3]
TRANSACTION = ROOT / "docs" / "transaction.md"

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
    return f"| {state.value} | {MEANING[state]} | {step.value} | {done} | {failed} | {tries} | {seconds} |\n"


def main() -> None:
    TRANSACTION.write_text(transaction())


if __name__ == "__main__":
    main()
