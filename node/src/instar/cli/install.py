"""`instar install` and `instar uninstall`: make this machine a node, and take that back.

The order that must hold: everything is checked before anything is written, also that the service manager can
start what it will be given; and `node.json`, which makes the folder a node, is written after the certificate.
A failed install removes what it made on this machine; that it was enrolled, if it came so far, the server keeps
(`instarctl nodes revoke`). Once all is written it stays: a start that fails then says how to go on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from instar.cli import control, ready, scripts, units
from instar.core.backoff import Backoff
from instar.core.errors import InputError, InstarError, MachineError, ServerUnreachable
from instar.core.releases import Release
from instar.core.settings import host_port
from instar.host import rescue
from instar.host.clock import Clock
from instar.host.disks import check_flags, check_space
from instar.host.files import make_folder, point_link, remove_tree, write_atomic
from instar.host.layout import LINES, Layout
from instar.host.line import MANIFEST, PROGRAM, Line
from instar.host.program import Program, running_program
from instar.host.records import Node, write_node
from instar.host.services import by_name, services_of
from instar.host.transport import Endpoint, Transport
from instar.oneshot.identity import check_embedded, make_key_and_csr
from instar.trust.embedded import EmbeddedConfig
from instar.trust.manifest import FileEntry, Manifest
from instar.trust.program import join_program, split_program

OLDEST_PYTHON = (3, 11)
SERVICES = ("auto", "systemd", "sysv", "openrc", "runit", "supervisor", "none")
COPIES = 3  # launcher, agent and updater each hold one
Say = Callable[[str], None]


def install(args: argparse.Namespace) -> dict[str, Any]:
    layout, program = Layout(args.state), running_program(sys.argv[0])
    settings = _settings(args.api)
    say: Say = (lambda _: None) if args.json else (lambda text: print(text, file=sys.stderr, flush=True))
    manager = _manager(args.service)
    check_machine(layout, program.path, manager, args.start)
    config = _configuration(args.embed or program.path, args.pin)
    made = not layout.state.exists()
    try:
        _folders(layout)
        node = _enrol(layout, config, program, args.wait, say)
        _releases(layout, program)
        write_atomic(layout.config, settings.encode())
        _records(layout, config, node, manager)
        if manager == "systemd":
            trouble = units.write_units(layout)
            if trouble and not args.start:  # else `start` says so
                say(f"the updater's API is off: {trouble}")
        else:
            scripts.write(manager, layout)
    except BaseException:
        _unregister(manager)
        _clear(layout, whole=made)
        raise
    say(f"enrolled as {node.node} in group {node.group}")
    running = begin(args, node.node)
    return {
        "node": node.node,
        "server": node.server,
        "group": node.group,
        "version": program.version,
        "digest": program.digest,
        "state": str(layout.state),
        "service": manager,
        "running": running,
    }


def begin(args: argparse.Namespace, node: str) -> list[str]:
    """Start what is installed, if that is wanted; the roles that run. A failure keeps its code, and tells what is
    there and how to go on: from here on nothing is taken back."""
    if not args.start:
        return []
    try:
        return list(control.start(args)["running"])
    except InstarError as error:
        error.text = (
            f"cannot start what is installed: {error.text}; {node} is enrolled and installed below {args.state}:"
            f" `instar start --state {args.state}` tries again, `instar uninstall --state {args.state}` removes it"
        )
        raise


def lines(answer: dict[str, Any]) -> Iterator[str]:
    yield f"{answer['node']} runs instar {answer['version']} below {answer['state']}"
    yield f"server {answer['server']}, group {answer['group']}, kept running by {_keeper(answer['service'])}"
    if not answer["running"]:
        yield f"start it with: instar start --state {answer['state']}"


def _keeper(manager: str) -> str:
    return "its own keeper (until the machine restarts)" if manager == "none" else manager


def _manager(wanted: str) -> str:
    """What `--service` says, found out for `auto`."""
    if wanted != "auto":
        return wanted
    return "systemd" if units.systemd_runs() else scripts.found()


def _unregister(manager: str) -> None:
    """Take the manager's files away. Absent is fine."""
    if manager == "systemd":
        units.remove_units()
    else:
        scripts.remove_all(manager)


def uninstall(args: argparse.Namespace) -> dict[str, Any]:
    """Stop everything, prove that it is gone, then remove it. Refuses a folder that is no node's."""
    layout = Layout(args.state)
    if not (layout.state / "service.json").exists():
        raise InputError("not-installed", f"cannot uninstall: {layout.state} is no node's state folder")
    services = services_of(layout, Clock())
    rescue.end(layout, Clock(), services.name == "systemd")  # first: it would start the roles again
    # Where systemd does not run, or the package with the units is gone, the processes are ended without it.
    loadable = services.name != "systemd" or units.loadable()
    for role in LINES:
        (services if loadable else by_name("bare", layout, Clock())).stop(role)
    _unregister(services.name)
    _clear(layout, whole=True)
    return {"removed": str(layout.state)}


def gone_lines(answer: dict[str, Any]) -> Iterator[str]:
    yield f"removed {answer['removed']}"


def _configuration(file: Path, pin: str) -> EmbeddedConfig:
    """What `file` carries (oneshot/identity.py says what is raised). One without a configuration is what a launcher
    is, and a package's program: then the way to one is named."""
    try:
        return check_embedded(file.read_bytes(), pin or None)
    except InputError as error:
        if error.code == "no-configuration":
            error.text += (
                "; take a program that `instarctl program download` has written, or name it with --embed FILE"
            )
        raise


def check_machine(layout: Layout, program: Path, manager: str, start: bool) -> None:
    """Raises InputError or MachineError with what keeps this machine from being a node. Writes nothing."""
    if layout.node.exists():
        text = f"cannot install: {layout.state} is a node's already; `instar uninstall` removes it"
        raise InputError("already-installed", text)
    if layout.state.exists() and any(layout.state.iterdir()):
        text = f"cannot install: expected {layout.state} to be absent or empty, and it holds other files"
        raise InputError("not-empty", text)
    if sys.version_info < OLDEST_PYTHON:
        raise MachineError("old-python", f"cannot install: expected Python 3.11 or newer, got {sys.version}")
    if manager != "none":
        _check_manager(layout, manager)
        ready.check(manager, start)
    parent = next(p for p in layout.state.parents if p.exists())
    check_flags(parent)
    check_space(parent, COPIES * 2 * program.stat().st_size)


def _check_manager(layout: Layout, manager: str) -> None:
    if os.getuid() != 0:
        text = f"cannot install for {manager}: expected to run as root; or use --service none"
        raise MachineError("not-permitted", text)
    scripts.check_path(manager, layout.state)
    if units.installed() if manager == "systemd" else scripts.installed(manager):
        text = f"cannot install for {manager}: another node of this machine has its files; uninstall that"
        raise InputError("already-installed", text)


def _settings(api: str | None) -> str:
    """The text of config.toml. Raises InputError `bad-config` when `--api` names no address."""
    if api is None:
        return CONFIG
    if api:
        host_port(api)
    return CONFIG.replace(API_LINE, f"api = {json.dumps(api)}")


def _folders(layout: Layout) -> None:
    for folder in (layout.identity, layout.trust, layout.journal, layout.staging, layout.jobs, layout.run):
        make_folder(folder, 0o700)
    for role in LINES:
        make_folder(layout.line(role).releases)
    make_folder(layout.launcher.parent)


def _enrol(layout: Layout, config: EmbeddedConfig, program: Program, wait_s: float, say: Say) -> Node:
    """Make the key here, have its request signed. Only a server that is not there yet is waited for."""
    write_atomic(layout.ca, config.ca.encode())
    key, csr = make_key_and_csr()
    body = {"v": 1, "token": config.token, "csr": csr.decode(), "facts": _facts(program)}
    transport = Transport(Endpoint(config.server, layout.ca, program=program.header("cli")))
    backoff, end = Backoff(0.2, 2.0, 5.0), time.monotonic() + wait_s
    while True:
        try:
            answer = transport.call("POST", "/v1/enrol", body)
            break
        except ServerUnreachable as error:
            if time.monotonic() > end:
                raise
            say(f"waiting for the server: {error.text}")
            time.sleep(backoff.next(random.random()))
    transport.close()
    try:
        node = Node(str(answer["node"]), config.server, str(answer["group"]), time.time())
        certificate = str(answer["certificate"])
    except (KeyError, TypeError) as error:
        raise ServerUnreachable("bad-answer", f"cannot enrol: the answer has no {error}") from None
    write_atomic(layout.key, key, 0o600)
    write_atomic(layout.certificate, certificate.encode())
    return node


def _facts(program: Program) -> dict[str, Any]:
    return {
        "hostname": socket.gethostname(),
        "os": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "python": platform.python_version(),
        "version": program.version,
    }


def _releases(layout: Layout, program: Program) -> None:
    """The first release of both lines, and the launcher's copy, from the program that is running."""
    bare = join_program(split_program(program.path.read_bytes())[0], b"")
    release = Release(program.version, program.digest)
    entry = FileEntry(PROGRAM, len(bare), hashlib.sha256(bare).hexdigest(), "0755")
    manifest = Manifest("instar", program.version, program.digest, (entry,)).encode()
    write_atomic(layout.launcher, bare, 0o755)
    for role in LINES:
        line = Line(layout.line(role))
        folder = line.folder(release.name)
        make_folder(folder)
        write_atomic(folder / PROGRAM, bare, 0o555)
        write_atomic(folder / MANIFEST, manifest, 0o444)
        line.mark_valid(release.name)
        point_link(line.layout.current, f"releases/{release.name}")


def _records(layout: Layout, config: EmbeddedConfig, node: Node, manager: str) -> None:
    root = json.dumps(config.root, sort_keys=True, separators=(",", ":")).encode()
    write_atomic(layout.trust / "pinned-root.json", root, 0o600)
    write_atomic(layout.state / "service.json", json.dumps({"v": 1, "manager": manager}).encode())
    write_node(layout, node)


def _clear(layout: Layout, whole: bool) -> None:
    if whole:
        remove_tree(layout.state)
        return
    for path in layout.state.iterdir():
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


API_LINE = '# api = "127.0.0.1:7612"'
CONFIG = """\
# What you may set on this node. Every line is optional; the values shown are the defaults.
# A file that cannot be read is reported in the log, and the defaults hold.

[trial]
# hold_s = 10.0        # a new release must run this long under one pid
# lease_s = 120.0      # and be confirmed within this, or it is reverted
# cap_s = 3600.0       # the longest stretch while nobody on this node reaches the server
# attempts = 3         # starts that a release on trial has

[rehearsal]
# within_s = 30.0

[probe]
# tries = 10           # after a switch, the new release must answer within so many questions
# every_s = 1.0        # that are this far apart

[network]
# rate_bytes_s = 0     # cap on fetching; 0 is none
# proxy = ""           # http://host:port

[updater]
# poll_s = 0.0         # 0: as the server says
# retry_floor_s = 1.0
# retry_cap_s = 300.0
# api = "127.0.0.1:7612"  # where the updater's API listens, with TLS; "" is nowhere

[wake]
# port = 7611          # a TCP connection to it makes the node phone home now; 0: no port
# trusted = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16",
#            "::1/128", "fc00::/7", "fe80::/10"]  # networks and addresses that may do that
# every_s = 1.0        # at most once in so many seconds

[modules]
# wasmtime = ""        # folder with the Python package wasmtime; "": where the interpreter looks

[native]
# mode = "auto"        # updates through the control channel: "never" takes none, "force" whatever is installed
# block = 65536        # bytes of one block at most
# window = 16          # blocks under way at most
# rate_bytes_s = 0     # cap; 0: as network.rate_bytes_s

[os]
# The system in two slots; after a change: instar stop, then instar start
# disk = ""            # the disk that has both, such as "/dev/nvme0n1"; "": this node has no slots
# slots = ["instar-system-a", "instar-system-b"]  # the names of their partitions
# esp = "/efi"         # where the disk's EFI system partition is mounted
# hardware = ""        # names that bundles may be for, blanks between them; "": what the firmware says
# answer_s = 10.0      # from an activation until the machine goes down
# guard_s = 300.0      # what boot-guard leaves a system for coming up, beside trial.cap_s
# min_bundle_version = ""  # no older bundle is taken
"""
