"""The world of tier T3: a real server on this machine, and machines under QEMU with real firmware that are its nodes.

A scenario reads like this (fixtures `world` and `machine` are in conftest.py):

    def test_reboots_into_the_next(world: World, machine: Machine) -> None:
        machine.start()                              # power on; enrolled, connected, says which version runs
        order = machine.update_os(world.publish(world.image(Y)), "reboot")
        machine.up(Y)                                # the serial line: which version came up, and how
        assert machine.ended(order)["outcome"] == "confirmed"       # what the server saw
        machine.power_off()                          # in good order; `cut_power()` is the other way
        firmware = oracles.Firmware.of(machine.vm.variables)        # the variable store, read offline
        assert firmware.slots == "ba"
        esp = oracles.Esp(machine.disk)                             # the EFI system partition, read offline
        assert esp.kernel("EFI/instar/b.efi").version == Y

- A scenario asserts on all of the serial line, the server, the variable store, the ESP and the slots.
- Broken systems: `world.broken("panics")` (instar_lab.osimage.variant.BROKEN lists them), then `publish` as ever.
- Bundles that are unlike the sound ones: `world.publish(image, hardware=("other",))`.
- Something done inside: `machine.do("rm /efi/EFI/instar/b.efi")`, a shell script; also while the network is cut.
- Something done to a machine that is off: `stores.lost(machine.vm.variables)`, `machine.fill_esp()`, then `start()`.
- Marks: `since = machine.mark` before, `machine.up(X, since=since)` after; without, it counts from the last start,
  update or `up`.
- Times are those of an idle machine times six or more; nothing here measures.

At most one machine runs at a time in one process; give each file's scenarios one xdist group. Those which leave the
machine on X, with whatever in slot B, take `on_x` in place of `machine`, and the group "vm-x" (conftest.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instar.core.errors import InstarError, ServerRefused, ServerUnreachable
from instar_lab import machine as processes
from instar_lab.machine import wait_for
from instar_lab.osimage import disk, signing, variant
from instar_lab.osimage.packages import run
from instar_lab.osimage.variant import Image
from instar_lab.osimage.vm import HOST, Vm
from instar_lab.program import build
from instar_lab.server import LabServer
from instar_server.trust.bundle import About, Built
from instar_server.trust.bundle import build as build_bundle
from tests.os.vm import stores

X, Y, Z = "1.0.0", "1.1.0", "1.2.0"  # sound systems
OLDEST = "0.9.0"  # that a node takes
PROGRAM = "1.0.0"  # the node's program on all of them
UP_S, READY_S, ENDED_S, OFF_S = 180.0, 240.0, 400.0, 120.0
KERNEL_PATH = "EFI/instar/{}.efi"

SETTINGS = """\
[os]
disk = "/dev/nvme0n1"
slots = ["instar-system-a", "instar-system-b"]
esp = "/efi"
hardware = "{hardware}"
min_bundle_version = "{oldest}"
answer_s = 1.0
guard_s = {guard_s}

[trial]
hold_s = 1.0
lease_s = {lease_s}
cap_s = {cap_s}

[rehearsal]
within_s = 120.0

[updater]
retry_floor_s = 0.5
retry_cap_s = 2.0
poll_s = 5.0

[wake]
port = 0
"""
SERVER_SETTINGS = "look_floor_s = 0.2\nping_s = 5.0\n"


def settings(lease_s: float = 180.0, cap_s: float = 600.0, more: str = "", guard_s: float = 300.0) -> str:
    """A node's config.toml."""
    made = SETTINGS.format(
        hardware=variant.HARDWARE, oldest=OLDEST, lease_s=lease_s, cap_s=cap_s, guard_s=guard_s
    )
    return made + more


def cache() -> Path:
    """What takes long to make and is the same each time; INSTAR_OS_CACHE names the folder."""
    return Path(os.environ.get("INSTAR_OS_CACHE") or Path(tempfile.gettempdir()) / "instar-os-cache")


class World:
    """The server, the images and the bundles. `folder` must be short: sockets lie below it."""

    def __init__(self, folder: Path, server_settings: str = SERVER_SETTINGS) -> None:
        self.folder, self.cache, self._server_settings = folder, cache() / "vm", server_settings
        self.server = LabServer(folder / "server", HOST)
        self.keys = signing.keys(self.cache / "keys")
        self.program = build.build(PROGRAM)
        self._count = 0
        self._published: dict[str, str] = {}

    def open(self) -> None:
        self.server.create()
        with self.server.layout.config.open("a") as file:
            file.write(self._server_settings)
        self.server.start()
        self.server.publish(self.program)

    def close(self) -> None:
        self.server.close()
        processes.end_all_naming(self.folder, grace_s=1.0)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- images and bundles

    def image(self, version: str, signed: bool = False) -> Image:
        """A sound system; `signed` for Secure Boot."""
        return variant.kept(version, self.cache, keys=self.keys if signed else None)

    def broken(self, how: str, signed: bool = False) -> Image:
        """A system with a fault. Its version says which: 2.<number>.0, newer than all sound ones."""
        version = f"2.{list(variant.BROKEN).index(how)}.0"
        return variant.kept(version, self.cache, how, keys=self.keys if signed else None)

    def publish(self, image: Image, **differs: Any) -> str:
        """Sign and publish its bundle; its name, as `update_os` takes it.

        `differs` are fields of `About` that are not as usual, such as `compatible=("other",)`, `min_version`,
        `deny_kexec`, `version`; give those a `name` of their own.
        """
        built, file = image.built, image.bundle
        if differs:
            about = About(variant.NAME, image.version, (variant.HARDWARE,), variant.ARCH)._replace(**differs)
            file = self.folder / f"{about.name}-{about.version}.bundle"
            built = build_bundle(about, image.root, image.kernel, file)
        return self.publish_built(built, file)

    def publish_built(self, built: Built, file: Path) -> str:
        name = f"{built.custom['name']}-{built.custom['version']}"
        if self._published.setdefault(name, built.sha256) != built.sha256:
            raise AssertionError(f"{name} is published already, with other content")
        self.server.publish_file(built, file)
        return name

    # --- machines

    def machine(
        self, image: Image, counting: bool = False, secure: bool = False, config: str | None = None
    ) -> Machine:
        """A new machine, off, with `image` in slot A and a node that is not enrolled yet.

        `counting`: with systemd-boot. `secure`: Secure Boot is on, and trusts what `self.keys` has signed.
        """
        self._count += 1
        folder = self.folder / f"m{self._count}"
        folder.mkdir()
        group = f"g-{uuid.uuid4().hex[:12]}"
        self.server.api.post("/groups", {"name": group})
        given = folder / "data" / "given"
        given.mkdir(parents=True)
        self.server.hand_out(self.program, self.server.token(1, group), given / "instar.pyz")
        (given / "config.toml").write_text(settings() if config is None else config)
        disk.copy(self._base(image, counting), folder / "disk.raw")
        disk.put_data(folder / "disk.raw", folder / "data")
        made = Machine(self, folder, group, image.version, secure)
        if secure:
            stores.with_keys(made.vm.variables, self.keys)
        return made

    def _base(self, image: Image, counting: bool) -> Path:
        """A disk with `image` and no data, kept beside the image."""
        path = image.root.with_name(f"disk-{'counting' if counting else 'plain'}-{os.getpid()}.raw")
        whole = path.with_name(f"disk-{'counting' if counting else 'plain'}.raw")
        if not whole.exists():
            with tempfile.TemporaryDirectory() as empty:
                disk.make(path, image, Path(empty), counting)
            path.rename(whole)
        return whole


class Machine:
    """`vm` is the machine, `group` the node's own; `since` is where `up` begins to look on the serial line, `began`
    where the test did."""

    def __init__(self, world: World, folder: Path, group: str, version: str, secure: bool) -> None:
        self.world, self.folder, self.group = world, folder, group
        self.disk = folder / "disk.raw"
        self.vm = Vm(folder, self.disk, secure=secure)
        self.since = self.began = 0
        self._version, self._id = version, ""

    # --- power

    def start(self, version: str = "", via: str = "firmware") -> None:
        """Power on; wait until `version` (that of its first image) is up, and its agent connected."""
        before = self._connected_since()
        self.power_on()
        self.up(version or self._version, via)
        self.connected(before)

    def power_on(self) -> None:
        self.since = self.vm.mark
        self.vm.start()

    def power_off(self) -> None:
        """As a person would, by the guest's own program."""
        self.vm.do("poweroff")
        self.vm.wait_end(OFF_S)
        self.vm.cut_power()

    def settle(self) -> None:
        """What it holds in memory goes to the disk: then that can be read as if it were off. Nothing if it is."""
        if self.vm.running:
            self.do("sync")

    def cut_power(self) -> None:
        """At once. What the guest had written and not flushed is on the disk all the same: replay is for that."""
        self.vm.cut_power()

    def reboot(self, version: str, via: str = "firmware") -> None:
        """By the guest's own program; wait as `start` does."""
        before, self.since = self._connected_since(), self.vm.mark
        self.vm.do("reboot")
        self.up(version, via)
        self.connected(before)

    # --- the serial line

    @property
    def mark(self) -> int:
        return self.vm.mark

    def wait(self, words: str, within_s: float = UP_S, since: int | None = None) -> str:
        """The first line that holds `words`."""
        return self.vm.wait_for(words, within_s, self.since if since is None else since)

    def up(self, version: str, via: str = "firmware", since: int | None = None) -> None:
        """Wait until the next system is up, and see that it is this one, started this way."""
        self.appears(version, via, since)
        self.wait("LAB ready", READY_S)

    def appears(self, version: str, via: str = "firmware", since: int | None = None) -> None:
        """As `up`, for a system that does not get any further than its first words."""
        line = self.wait("LAB up ", READY_S, since)
        assert f"version={version} via={via} " in line, f"expected {version} by {via}: {line}\n{self.words()}"
        self.since = 1 + next(
            n for n, text in enumerate(self.vm.lines()) if text == line and n >= (since or self.since)
        )

    def versions(self) -> list[str]:
        """All systems that came up in this test, in order: ['1.0.0 firmware', '1.1.0 kexec']."""
        lines = [line.split() for line in self.vm.lines(self.began) if "LAB up version=" in line]
        return [
            " ".join(word.partition("=")[2] for word in words if word.startswith(("version=", "via=")))
            for words in lines
        ]

    def do(self, script: str, within_s: float = 60.0) -> str:
        """Have the guest run a shell script; what that said."""
        return self.vm.do(script, within_s)

    def instar(self, *words: str, within_s: float = 90.0) -> str:
        """The node's own command line, inside."""
        line = "python3 -I -S /data/instar/launcher/instar.pyz {} --state /data/instar"
        return self.do(line.format(" ".join(words)), within_s)

    def words(self) -> str:
        """The end of the serial line and of the server's log, for an error message."""
        return "\n".join([*self.vm.lines()[-60:], processes.tail(self.world.server.log, 25)])

    # --- what the server sees

    @property
    def id(self) -> str:
        """Once it has enrolled."""
        if not self._id:
            found = self.world.server.api.get("/nodes", group=self.group)["nodes"]
            assert len(found) == 1, f"{len(found)} nodes in {self.group}\n{self.words()}"
            self._id = found[0]["id"]
        return self._id

    def connected(self, after: float = 0.0) -> None:
        """Wait for the agent on a channel that began after `after` (unix time)."""
        self._wait(lambda: self._connected_since() > after, "a connected agent", READY_S)

    def _connected_since(self) -> float:
        found = self.world.server.api.get("/nodes", group=self.group)["nodes"]
        return float(found[0]["connected_since"] or 0.0) if found else 0.0

    def system(self) -> dict[str, Any]:
        """GET /nodes/{id}/system: slots, boot, updates (newest first)."""
        return dict(self.world.server.api.get(f"/nodes/{self.id}/system"))

    def reported(
        self, look: Callable[[dict[str, Any]], object], what: str, within_s: float = 60.0
    ) -> dict[str, Any]:
        """Wait until what the node has told of its system is so; all of it."""
        self._wait(lambda: bool(look(self.system())), what, within_s)
        return self.system()

    def update_os(self, bundle: str, activation: str, **more: Any) -> dict[str, Any]:
        """POST /nodes/{id}/update-os; the order. Raises ServerRefused with the code. `more`: override_cold_boot."""
        self.reported(lambda system: system["running"], "a node that has told of its slots")
        self.since = self.vm.mark
        body = {"bundle": bundle, "activation": activation, **more}
        return dict(self.world.server.api.post(f"/nodes/{self.id}/update-os", body))

    def cold_boot(self) -> None:
        """POST /nodes/{id}/cold-boot, now."""
        self.reported(lambda system: system["running"], "a node that has told of its slots")
        self.since = self.vm.mark
        self.world.server.api.post(f"/nodes/{self.id}/cold-boot", {})

    def refused(self, bundle: str, activation: str | None, **more: Any) -> str:
        """The code with which the server refuses an order."""
        body = {"bundle": bundle, **({"activation": activation} if activation is not None else {}), **more}
        try:
            self.world.server.api.post(f"/nodes/{self.id}/update-os", body)
        except ServerRefused as error:
            return error.code
        raise AssertionError(f"the server took {body}")

    def order(self, order: dict[str, Any]) -> dict[str, Any]:
        """How it stands now."""
        return next(each for each in self.system()["updates"] if each["id"] == order["id"])

    def ended(self, order: dict[str, Any], within_s: float = ENDED_S) -> dict[str, Any]:
        """Wait until an order is open no more; how it ended (`outcome`, `code`, `text`, …)."""
        self._wait(lambda: self.order(order)["state"] != "open", "an ended update", within_s)
        return self.order(order)

    def history(self) -> list[dict[str, Any]]:
        """The server's, of this node, oldest first."""
        return self.world.server.history(self.id)

    def _wait(self, look: Callable[[], bool], what: str, within_s: float) -> None:
        def seen() -> bool:
            with contextlib.suppress(ServerUnreachable):
                return look()
            return False

        wait_for(seen, what, within_s, self.words, every_s=0.3)

    # --- while it is off

    def put(self, path: str, source: Path) -> None:
        """A file into the EFI system partition, in place of one of that name; `path` without a leading slash."""
        image, folders = (
            f"{self.disk}@@{disk.AT_MIB['esp']}M",
            [str(each) for each in Path(path).parents][-2::-1],
        )
        for folder in folders:
            run("sh", "-c", f"mmd -D s -i {image} ::/{folder} </dev/null || true")
        run("mcopy", "-o", "-i", image, str(source), f"::/{path}")

    def fill_esp(self, leave: int = 1 << 20) -> None:
        """Fill the EFI system partition with a file `filler` until `leave` bytes are free."""
        image = f"{self.disk}@@{disk.AT_MIB['esp']}M"
        said = run("mdir", "-i", image, "::/")
        free = int("".join(said.strip().splitlines()[-1].split()[:-2]))
        filler = self.folder / "filler"
        with filler.open("wb") as file:
            file.truncate(max(0, free - leave))
        run("mcopy", "-i", image, str(filler), "::/filler")

    def close(self) -> None:
        with contextlib.suppress(InstarError):
            self.vm.cut_power()
        shutil.rmtree(self.folder, ignore_errors=True)
