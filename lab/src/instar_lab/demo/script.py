"""What the demo does, as data: seven releases, what is wrong with five of them, what must come of each; then
what is done with modules on the nodes that came through it."""

from __future__ import annotations

from dataclasses import dataclass

from instar.host.layout import LINES

GOOD = "1.1.0"
AGENT = ("agent",)
GROUP = "default"
ASKED, KEPT, VERSION = "interfaces.list", "file.integrity", "1.0.0"  # modules that need no compiler


@dataclass(frozen=True, slots=True)
class Step:
    """`variant` is one of instar_lab.program.variants, or '' for a sound build.

    `altered`: a byte of the published archive is changed after it was signed. `moves`: whether every
    node must end on this release; else it must still run GOOD. `trial`: whether the release gets as far
    as being activated before it is given up.
    """

    name: str
    version: str
    story: str
    variant: str = ""
    altered: bool = False
    moves: bool = False
    trial: bool = False
    lines: tuple[str, ...] = LINES


STEPS = (
    Step("install", "1.0.0", "nodes are installed with 1.0.0 and enrol", moves=True),
    Step("update", GOOD, "a sound release", moves=True, trial=True),
    Step("does not start", "1.2.0", "it ends at once with an error", variant="does-not-start"),
    Step("hangs", "1.3.0", "it starts, does nothing, and ignores TERM", variant="hangs", lines=AGENT),
    Step(
        "wrong reply", "1.4.0", "its rehearsal job gives a wrong answer", variant="wrong-reply", lines=AGENT
    ),
    Step(
        "crashes when active",
        "1.5.0",
        "it rehearses well, and aborts a second after activation",
        variant="crashes-once-activated",
        trial=True,
        lines=AGENT,
    ),
    Step("altered", "1.6.0", "a byte of it was changed after it was signed", altered=True),
)


@dataclass(frozen=True, slots=True)
class Act:
    """Something that is done with modules, by the method of instar_lab.demo.work that has this name."""

    name: str
    wanted: str
    story: str
    outcome: str


ACTS = (
    Act("a new module", f"{ASKED} {VERSION}", "a job for all nodes; none has its module yet", "answered"),
    Act("a service module", f"{KEPT} {VERSION}", "it comes with a trial of its own", "installed"),
    Act("restart of a module", KEPT, "while jobs arrive", "restarted"),
    Act("restart of the agent", "agent", "while jobs arrive", "restarted"),
)
