"""What --help teaches: the first day with a server, told once, shown by instarctl --help."""

from __future__ import annotations


def flow(text: str) -> str:
    """Paragraphs without the line ends of the source, which the terminal's width need not fit."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def steps(*lines: str) -> str:
    """An epilog: each line stays a line of its own; commands begin with '$'."""
    return "\n".join(line if line.startswith("$") else f"[bold]{line}[/bold]" for line in lines)


MAIN = flow("""Run a fleet: enrol machines, want releases, see what came of it.

A node is a machine with two programs, the agent and the updater. Nothing is pushed to it: you want a release
for a group or a node, and each node fetches it, checks its signatures, rehearses it, tries it, and keeps it
or goes back by itself. 'nodes list' shows how far each one is, 'nodes history' what happened and why.

Jobs and restarts go out at once, and their answers come back: 'job run' runs a module on every node that is
meant, 'restart' restarts modules or agents.

A command ends with 0, or with one line on stderr and 2 (your words), 3 (a signature or a history is not what
it should be), 4 (this machine), 5 (the server cannot be reached) or 6 (the server said no). What is waited for
and did not go well ends with 1 ('job run', 'restart', '--wait', '--watch'), a release that a node refused or
went back from with 7 ('updater push'). With --json it prints JSON, errors too, on stdout. The server is found by
--server, --token and --ca, else by INSTARCTL_SERVER, INSTARCTL_TOKEN_FILE and INSTARCTL_CA, else by what 'login'
wrote.
""")


FIRST_DAY = steps(
    "Your first day, after 'instar-server init' and 'instar-server run':",
    "1. Say once where the server is, and see that it is well.",
    "$ instarctl login --server https://fleet.example.org:8444 --token DATA/admin.token --ca DATA/ca/ca.pem",
    "$ instarctl status",
    "2. Publish a release; 'instarctl release --help' tells who signs it, and how.",
    "$ instarctl release publish targets.json --archive instar-1.0.0.tar.gz",
    "3. Let ten machines into the group web: a token, and with it the one file that installs a node.",
    "$ instarctl tokens create --group web --uses 10 --lifetime 2d",
    "$ instarctl program download --token TOKEN --out instar.pyz",
    "4. On each machine:",
    "$ sudo python3 instar.pyz install",
    "5. See them come, want the next release, see who has it.",
    "$ instarctl nodes list --group web",
    "$ instarctl want --group web --version 1.1.0",
    "$ instarctl nodes list --group web",
    "6. Ask them something; those that do not have the module fetch it.",
    "$ instarctl job run disk.usage --group web",
    "7. One went back? Its history says why; the same wish again makes it try again.",
    "$ instarctl nodes history NODE",
)

JOB = flow("""Jobs: run a module once on many nodes and see what each of them answers.

Who is meant is settled when the job is ordered. A node that is off gets it when it comes back, unless it has
lapsed by then; each node runs it once. A row is queued (the node is off), sent, taken (on the node's disk),
running, and ends as done, failed, cancelled, lapsed, or lost (taken, and never heard of again).

'job run' shows the answers as they come and ends with 0 when every node did it, with 1 otherwise. Interrupting it
does not end the job: 'job cancel' does.
""")

MODULE = flow("""Modules: signed code that nodes fetch when it is first needed.

A one-shot module is run by 'job run'. A service module stays on a node: 'want --module' puts it there, with
a trial as for a release, and 'unwant --module' takes it away; 'job run' asks it a question.
""")

BUNDLE = flow("""System bundles: a root image and a kernel image in one file, for nodes with two slots. Works offline.
""")

NODES = flow("""Nodes: what they run, how they are, what happened.

A node is connected, offline, never-seen (enrolled, and nothing since), revoked, or a beacon: no release runs
there, and its launcher calls for help. Its last update is shown
with the phase it is in: confirmed means that it stays; after reverted, the history says why.

A node whose system lies in two slots is moved to another image by 'update-os', which must be told how the node
comes to run it: none (not yet), reboot or kexec. 'system' shows both slots.
""")

TOKENS = flow("""Enrolment tokens: the right to become a node.

A token is for one group, so many machines and so long. It is shown once, when it is made; whoever has it may
enrol, so give it the shortest life that will do. Revoking it does not touch the nodes that used it.
""")

API_TOKENS = flow("""Tokens for the API and this command.

A viewer may look, an operator may change the fleet, an admin may also make API tokens. Give every
person and every script its own, so that one can be revoked.
""")

OPERATOR = flow("""Operators: people who may use the updaters of nodes directly.

Their certificates are for the API that each node's updater has. With one, whoever holds its key may put a
published, signed release or system on a node, or take it back to the previous one: nothing else. Nodes keep
no list of revoked ones, so give them the shortest life that will do.
""")

UPDATER = flow("""The updater of one node, spoken to directly, without the server.

Each node's updater listens on port 7612, by default only for its own machine. It is known by its
certificate, and only the node that --node names is spoken to. Who asks is an operator: see 'operator issue'.

'push' and 'rollback' follow what they began to its end, and end with 0 when the node keeps it. When it goes
back they end with 7, and say why, with what the probes of both releases saw. A release that was pushed waits
for the node's server, which tests each one; a way back does not.
""")

PROGRAM = flow("""The one file that installs a node.

It is a signed release with this server's address, CA certificate and an enrolment token in it: as secret as
the token.
""")

TRUST = flow("""The signed repository: what nodes check every release against.

Nodes refuse metadata that has expired. The server signs snapshot and timestamp anew by itself; root and
targets are signed by people: see 'instarctl keys' and 'instarctl release'.
""")


EXAMPLES = {
    "nodes": steps(
        "$ instarctl nodes list --group web",
        "$ instarctl nodes history NODE --limit 20",
        "$ instarctl nodes poke NODE",
        "$ instarctl node recover NODE --wait",
        "$ instarctl node transfer NODE --watch",
        "$ instarctl node update-os NODE --bundle web-1.1.0 --activation reboot --wait",
        "$ instarctl node system NODE",
        "$ instarctl node cold-boot NODE --in 2h",
    ),
    "job": steps(
        "$ instarctl job run interfaces.list --group web",
        "$ instarctl job run disk.usage path=/var --all --where os=linux",
        "$ instarctl job run file.integrity do=changes since=0 --node NODE",
        "$ instarctl job run packages.list --node NODE --deadline 2m --json",
        "$ instarctl job list",
        "$ instarctl job show ORDER",
        "$ instarctl job cancel ORDER",
    ),
    "restart": steps(
        "$ instarctl restart --group web",
        "$ instarctl restart --node NODE --module inventory --module file.integrity",
        "$ instarctl restart --all --modules-only --within 1m",
    ),
    "module": steps(
        "$ instarctl module list",
        "$ instarctl module pack modules/inventory --out dist",
        "$ instarctl want --group web --module inventory --version 1.0.0",
    ),
    "bundle": steps(
        "$ instarctl bundle build --root root.img --kernel kernel.efi --name web --version 1.1.0 "
        "--compatible board-7",
        "$ instarctl bundle show web-1.1.0.bundle",
    ),
    "tokens": steps("$ instarctl tokens create --group web --uses 10 --lifetime 12h --label 'rack 4'"),
    "operator": steps("$ instarctl operator issue ada --out ada --lifetime 7d"),
    "updater": steps(
        "$ instarctl release parcel 1.1.0 --out 1.1.0.parcel",
        "$ instarctl updater push 1.1.0.parcel --node NODE --operator ada",
        "$ instarctl updater push 1.1.0.parcel --line updater --node NODE --operator ada",
        "$ instarctl updater rollback --node NODE --address HOST:7612 --operator ada",
        "$ instarctl updater update-os --bundle web-1.1.0 --activation reboot --wait --node NODE --operator ada",
        "$ instarctl updater system --node NODE --operator ada",
        "$ instarctl updater watch --node NODE --cert ada/cert.pem --key ada/key.pem --ca ada/ca.pem",
    ),
    "program": steps("$ instarctl program download --token TOKEN --out instar.pyz"),
    "want": steps(
        "$ instarctl want --group web --version 1.1.0",
        "$ instarctl want --node NODE --version 1.1.0 --line agent",
        "$ instarctl want --group web --version 1.1.0 --via native",
        "$ instarctl want --group web --module inventory --version 1.0.0",
    ),
    "unwant": steps(
        "$ instarctl unwant --node NODE",
        "$ instarctl unwant --group web --line updater",
        "$ instarctl unwant --group web --module inventory",
    ),
    "login": steps(
        "$ instarctl login --server https://fleet.example.org:8444 --token admin.token --ca ca.pem"
    ),
}
