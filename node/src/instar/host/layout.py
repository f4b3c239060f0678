"""Where everything lies below a node's state folder. Paths only: nothing is read or written here.

<state>/
  identity/     key.pem cert.pem ca.pem node.json        who this node is, and its server
  trust/        root.json …                              TUF metadata
  agent/        releases/<release>/ current -> releases/… previous -> releases/… trial.json
  updater/      (the same)
  launcher/     instar.pyz                               the oldest copy
  staging/      only while a transaction runs
  incoming/     parcels that came through the control channel or the updater's API
  rescue/       what a recovery core is fetching
  journal/      <transaction>.journal
  jobs/         inbox and outbox
  commands/     restarts that were asked for, and how they went
  modules/<name>/  releases/<release>/ current previous trial.json data/ used retired.json incoming/
  run/          sockets, locks, process records
  config.toml   what an operator may set (docs/configuration.md)
  quarantine.json               releases that failed here
  held.json                     lines that a push holds against older wishes
  orders.json                   a rollback or push that was accepted, until it is begun
"""

from __future__ import annotations

from pathlib import Path

from instar.core.light import dataclass

LINES = ("agent", "updater")


@dataclass(frozen=True, slots=True)
class LineLayout:
    """One line of releases: what `current` points to is what runs."""

    folder: Path

    @property
    def releases(self) -> Path:
        return self.folder / "releases"

    @property
    def current(self) -> Path:
        return self.folder / "current"

    @property
    def previous(self) -> Path:
        return self.folder / "previous"

    @property
    def trial(self) -> Path:
        return self.folder / "trial.json"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"


@dataclass(frozen=True, slots=True)
class ModuleLayout(LineLayout):
    """A module's releases. For a service module, `current` is what runs; a one-shot module has no links."""

    @property
    def data(self) -> Path:
        """What a stateful module keeps: the only folder that it may write to unless its manifest says more."""
        return self.folder / "data"

    @property
    def retired(self) -> Path:
        """Says that the module is no longer wanted, and since when its data waits to be removed."""
        return self.folder / "retired.json"

    @property
    def incoming(self) -> Path:
        """What is being fetched for a job, kept over a kill: `<digest>.part`."""
        return self.folder / "incoming"

    @property
    def fetching(self) -> Path:
        """Held (flock) by the one process that fetches a release of it for a job."""
        return self.folder / "fetching.lock"

    @property
    def used(self) -> Path:
        """An empty file whose time says when the module was last run."""
        return self.folder / "used"

    @property
    def process(self) -> Path:
        """The record of the process that runs a service module."""
        return self.folder / "process.json"


@dataclass(frozen=True, slots=True)
class Layout:
    state: Path

    def line(self, name: str) -> LineLayout:
        return LineLayout(self.state / name)

    def module(self, name: str) -> ModuleLayout:
        """`name` must have been checked (trust.module.check_name): it is a folder's name."""
        return ModuleLayout(self.modules / name)

    @property
    def modules(self) -> Path:
        return self.state / "modules"

    @property
    def commands(self) -> Path:
        return self.state / "commands"

    @property
    def identity(self) -> Path:
        return self.state / "identity"

    @property
    def key(self) -> Path:
        return self.identity / "key.pem"

    @property
    def certificate(self) -> Path:
        return self.identity / "cert.pem"

    @property
    def ca(self) -> Path:
        return self.identity / "ca.pem"

    @property
    def node(self) -> Path:
        return self.identity / "node.json"

    @property
    def trust(self) -> Path:
        return self.state / "trust"

    @property
    def launcher(self) -> Path:
        return self.state / "launcher" / "instar.pyz"

    @property
    def staging(self) -> Path:
        return self.state / "staging"

    @property
    def incoming(self) -> Path:
        return self.state / "incoming"

    @property
    def rescue(self) -> Path:
        """What recovery cores fetch, kept over a kill."""
        return self.state / "rescue"

    @property
    def held(self) -> Path:
        """Lines that an operator has pushed a release to, against wishes that are no newer."""
        return self.state / "held.json"

    @property
    def orders(self) -> Path:
        """The operator's order that was accepted, and is not begun yet."""
        return self.state / "orders.json"

    @property
    def artifacts(self) -> Path:
        """Where the server serves metadata and targets, if not where it serves the rest."""
        return self.run / "artifacts.json"

    @property
    def journal(self) -> Path:
        return self.state / "journal"

    @property
    def jobs(self) -> Path:
        return self.state / "jobs"

    @property
    def run(self) -> Path:
        return self.state / "run"

    @property
    def config(self) -> Path:
        return self.state / "config.toml"

    @property
    def quarantine(self) -> Path:
        return self.state / "quarantine.json"

    @property
    def system(self) -> Path:
        """What is known of the operating system's slots."""
        return self.state / "os"

    @property
    def slots(self) -> Path:
        return self.system / "slots.json"

    def socket(self, role: str) -> Path:
        """The Unix socket of the agent's or the updater's local API."""
        return self.run / f"{role}.sock"

    def process(self, role: str) -> Path:
        """The record of the process that plays `role`."""
        return self.run / f"{role}.json"

    @property
    def starts(self) -> Path:
        """When the agent was started without a welcome since (recovery/launch.py)."""
        return self.run / "agent.unheard"

    def role_lock(self, role: str) -> Path:
        """Held (flock) by the one process that plays `role`."""
        return self.run / f"{role}.lock"
