"""The figures as a table for people and as docs/performance.md."""

from __future__ import annotations

import datetime
import os
import platform
import ssl
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.figures import Figure, number

COLUMNS = ("figure", "measured", "least–most (times)", "aim", "others (how many times ours)")
LIBRARIES = ("aiohttp", "uvloop", "sqlalchemy", "tuf", "wsproto")

INTRODUCTION = """\
# Performance

Written by `make bench`; do not edit. Each figure is the median of its measurements. Everything ran on one
machine over loopback: server, nodes and the simulated agents shared its cores, so the figures of the server
are on the high side of what a server of its own would need.

"""

METHOD = """\

## How it is measured
- **update gap**: the agent's local API is asked without a pause. From the last answer of the old agent to the moment
  at which the server takes the new agent's hello.
- **whole update**: from the answer to `want` to the journal's `confirmed` record, less the trial's hold time. TUF
  metadata, fetching, unpacking, rehearsal with a runner process, the switch, the health job, both verdicts and every
  fsync are in it.
- **update test**: `instar-lab update-test`, agent line, held for 0.2 s, each update after a random wait of up to
  100 ms to a build that the node never had. An update lasts from before the order until the server has stored the
  `confirmed`; publishing the build is not in it. Pull: the node fetches; native: through the control channel;
  recovery: a recovery core is sent, which fetches.
- **idle memory**: resident set (RSS) of the process from /proc, thirty seconds after the last event, median of nodes.
- **server memory per connection**: growth of the server's RSS by the simulated agents, divided by their number. Every
  agent has its own certificate and enrolled for it.
- **CPU per connect and per message**: user and system time of the server process, from /proc. A connect is TCP, mutual
  TLS, the revocation check, the upgrade, hello and welcome, and the storing of what the hello said. A message is a
  ping and its pong.
- **all back**: the server is ended with TERM and started again at once. From its end to the moment at which every
  simulated agent has been welcomed again. The agents keep to the reconnect rules of real ones.
- **job**: from the API call of `POST /jobs` with `wait_s` to its answer with the node's reply in it, one after the
  other over one connection: server, channel, the node's durable inbox, a runner process, the module, the reply
  stored on the server, each fsync of both. p50 is the median, p99 the 99th of a hundred. Warm means that the fork
  server runs; cold, that it was killed before each job. The modules do nothing but give a number back.
- **restart until it answers**: jobs are ordered without a pause from before the order to after its end; the longest
  time between two answers. Lost are jobs that did not end well.
- **one job on simulated nodes**: the same call for all of them; each answers at once.
- **image into a slot**: 200 MB of this machine's own files below /usr/lib, a block's beginning each, with some zeros
  between, into a file that has all its blocks; by turns, each after everything else has reached the disk. Ours is one
  update by the node's own code and journal, from the order to the slot that was checked: the child that brings the TUF
  metadata up to date and verifies it, a real server over TLS with the node's certificate, zstd, SHA-256 of each chunk
  before it is written, a sync every 8 MiB, the whole slot read back past the page cache and hashed again. Nothing of
  what the node runs is in the new image; in the one figure it knows that from the manifest that it keeps of its own
  system, in the other it reads its whole slot first. The start of the interpreter is not in it. RAUC's is `rauc
  install` by its service, with a bundle that is in the page cache: signature, image, sync; it does not read back. As
  `rauc bundle` packs it (gzip), and with zstd, which is its fastest. dd's is `bs=1M conv=fsync` from the page cache.
- **peak memory of an update**: the most that was ever resident (VmHWM) of the process that makes the update; of RAUC's
  service. The library libzstd and Python's ctypes are 2 MB of ours; the rest over the updater at rest is what waits
  between network, processor and disk.
- **fetched where one package has changed**: two images of the lab's system (`instar_lab.osimage`), in one of which a
  package is of an older version of Debian's; bytes of the bundle that came over the network, its manifest and the
  kernel image included, in percent of both images.
- **node away for another system**: in QEMU without hardware acceleration, with OVMF; from the last heartbeat that the
  server had of the one system to the hello of the other. Heartbeats come every second. By turns in one
  machine.

The figures of other programs were measured once, on a machine of the same size, each with its newest release
of November 2026 and started by hand where nothing else is said; MeshAgent is MeshCentral's agent. Those marked
"(this run)" were measured in turns with ours: RAUC and dd always, the others by `make bench ARGS=--peers`;
`bench/peers/beside.py` says how.
"""


def machine() -> str:
    """What it ran on, in one line: no names."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{os.cpu_count()} × {model}, {memory:.0f} GiB, Linux {kernel}"


def versions() -> str:
    found = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    return f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION.split('  ')[0]}, {found}"


def show(figures: Sequence[Figure], console: Console) -> None:
    table = Table(title="Instar, measured")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in ("measured", "aim") else "left")
    for row, figure in zip(rows(figures), figures, strict=True):
        style = {True: "green", False: "bold red", None: ""}[figure.met]
        table.add_row(*row, style=style)
    console.print(table)


def rows(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    return [
        (
            figure.name + (f" — {figure.note}" if figure.note else ""),
            f"{figure.shown()} {figure.unit}",
            figure.spread(),
            "" if figure.aim is None else f"< {number(figure.aim)} {figure.unit}",
            figure.ratios(),
        )
        for figure in figures
    ]


def markdown(figures: Sequence[Figure], today: datetime.date) -> str:
    head = f"{today.isoformat()}, {machine()}. {versions()}."
    return _document([head], _lines(figures))


def merged(document: str, figures: Sequence[Figure], today: datetime.date, only: str) -> str:
    """`document` with these figures in the place of those of the same names, or behind the others."""
    before, _, table = document.partition(TABLE)
    own = f"By itself (`--only {only}`), on "
    heads = [line for line in before.splitlines() if line.startswith(("20", "By itself"))]
    heads = [line for line in heads if not line.startswith(own)]
    kept = {_name(line): line for line in table.partition(METHOD)[0].splitlines() if line.startswith("| ")}
    kept |= {_name(line): line for line in _lines(figures)}
    names = ", ".join(sorted({figure.name.partition(",")[0] for figure in figures}))
    return _document([*heads, f"{own}{today.isoformat()}: {names}."], list(kept.values()))


TABLE = "| " + " | ".join(COLUMNS) + " | met |\n|---|--:|---|--:|---|---|\n"


def _document(heads: Sequence[str], lines: Sequence[str]) -> str:
    return INTRODUCTION + "\n\n".join(heads) + "\n\n" + TABLE + "\n".join(lines) + "\n" + METHOD


def _lines(figures: Sequence[Figure]) -> list[str]:
    met = {True: "yes", False: "**no**", None: ""}
    found = zip(rows(figures), figures, strict=True)
    return ["| " + " | ".join(row) + f" | {met[figure.met]} |" for row, figure in found]


def _name(line: str) -> str:
    return line.split(" | ", maxsplit=1)[0].partition(" — ")[0]
