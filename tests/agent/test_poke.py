"""The wake-up port (R2): a real process that runs it, real connections, its memory and descriptors looked at."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import os
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import instar
from instar.core.networks import PRIVATE
from instar.wire.messages import Health, Ping, Welcome
from instar_lab import machine
from tests.agent.fleet import Agent, Connection, Place, Server

SOURCE = Path(instar.__file__).parents[1]
FRIEND = "127.0.0.1"
EVERY_S = 0.5
WITHIN_S = 60.0
RUN = """
import sys; sys.path.insert(0, sys.argv[1])
import asyncio, json, logging, time
from instar.agent.poke import Poke
from instar.core.networks import WakeSettings
logging.basicConfig(level="INFO", format="%(message)s")
wanted = json.loads(sys.argv[2])
settings = WakeSettings(wanted["port"], tuple(wanted["trusted"]), wanted["every_s"])
seen = 0.0
def now():
    global seen
    seen = time.monotonic()
    return seen
def woken(peer):
    print(json.dumps([seen, peer]), flush=True)
async def main():
    poke = Poke(settings, woken, now, retry_s=0.2)
    task = asyncio.create_task(poke.run())
    await asyncio.sleep(0)
    print(json.dumps(["port", poke.port]), flush=True)
    await task
asyncio.run(main())
"""


class Woken:
    """A process that does nothing but keep a wake-up port."""

    def __init__(self, folder: Path, port: int, trusted: list[str], network_namespace: str = "") -> None:
        self.port, self.log = port, folder / "poke.log"
        self.out = folder / "poke.out"
        told = json.dumps({"port": port, "trusted": trusted, "every_s": EVERY_S})
        words = [sys.executable, "-I", "-S", "-c", RUN, str(SOURCE), told]
        if network_namespace:
            words = ["ip", "netns", "exec", network_namespace, *words]
        with self.log.open("wb") as log, self.out.open("wb") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=log)
        machine.wait_for(
            lambda: self.out.read_bytes().endswith(b"\n"), "a wake-up port", WITHIN_S, self.said, every_s=0.02
        )

    def said(self) -> str:
        return self.log.read_text()

    @property
    def listens_on(self) -> int:
        return int(json.loads(self.out.read_text().splitlines()[0])[1])

    def wakes(self) -> list[tuple[float, str]]:
        return [tuple(json.loads(line)) for line in self.out.read_text().splitlines()[1:]]

    def wait_for_wakes(self, count: int) -> list[tuple[float, str]]:
        machine.wait_for(
            lambda: len(self.wakes()) >= count, f"{count} wakes", WITHIN_S, self.said, every_s=0.01
        )
        return self.wakes()

    def held(self) -> tuple[int, int]:
        """Resident bytes, open descriptors."""
        return machine.rss(self.process.pid), descriptors(self.process.pid)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def descriptors(pid: int) -> int:
    """How many it has while it only waits: one that it takes in just now is there for a moment."""
    counts = []
    for _ in range(20):
        counts.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.005)
    return min(counts)


@contextlib.contextmanager
def waking(folder: Path, **settings: Any) -> Iterator[Woken]:
    made = Woken(folder, settings.pop("port", None) or machine.free_port(), **settings)
    try:
        yield made
    finally:
        made.end()


def poke(port: int, source: str = FRIEND, data: bytes = b"") -> None:
    """One connection; what the port does to it is no error."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(WITHIN_S)
        client.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT: as many as there are pairs
        client.bind((source, 0))
        client.connect(("::1" if family == socket.AF_INET6 else FRIEND, port))
        with contextlib.suppress(ConnectionError):
            client.sendall(data)


def scan(port: int, count: int) -> None:
    """Many strangers, from many addresses, with random bytes. Faster than this, and the kernel drops most."""
    chance = random.Random(count)
    for number in range(count):
        if number % 100 == 99:
            time.sleep(0.02)
        poke(port, f"127.0.{1 + number % 200}.{1 + number % 249}", chance.randbytes(chance.randrange(200)))


def test_scan_by_strangers_does_nothing_and_costs_nothing(tmp_path: Path) -> None:
    _scanned(tmp_path, 3_000)


@pytest.mark.slow
def test_100000_connections_with_random_bytes(tmp_path: Path) -> None:
    _scanned(tmp_path, 100_000)


def _scanned(folder: Path, count: int) -> None:
    with waking(folder, trusted=[f"{FRIEND}/32"]) as woken:
        scan(woken.port, 1_000)  # whatever a process needs once
        before = woken.held()
        scan(woken.port, count)
        poke(woken.port)  # taken after all of them: the port has seen each
        woken.wait_for_wakes(1)
        after = woken.held()
        print(f"{count} connections: {before} -> {after} (bytes, descriptors)")
        assert [peer for _, peer in woken.wakes()] == [f"::ffff:{FRIEND}"]
        assert after[1] == before[1]
        assert after[0] - before[0] <= 256 * 1024
        assert woken.process.poll() is None


def test_trusted_pokes_count_once_in_every_s_and_the_last_is_not_lost(tmp_path: Path) -> None:
    with waking(tmp_path, trusted=["127.0.0.0/8"]) as woken:
        end = time.monotonic() + WITHIN_S
        while len(woken.wakes()) < 4:
            assert time.monotonic() < end, woken.wakes()
            poke(woken.port)
            time.sleep(0.02)
        last = time.monotonic()
        poke(woken.port)
        machine.wait_for(
            lambda: woken.wakes()[-1][0] >= last, "a wake for the last", WITHIN_S, woken.said, every_s=0.02
        )
        count = len(woken.wakes())
        time.sleep(1.5 * EVERY_S)  # nothing comes any more
        times = [at for at, _ in woken.wakes()]
        assert len(times) == count
        assert all(b - a >= EVERY_S for a, b in itertools.pairwise(times)), times


def test_ipv6_and_ipv4_share_the_port_and_each_has_its_networks(tmp_path: Path) -> None:
    with waking(tmp_path, trusted=["::1"]) as woken:
        poke(woken.port, FRIEND)  # a stranger here
        poke(woken.port, "::1")
        assert [peer for _, peer in woken.wait_for_wakes(1)] == ["::1"]


def test_not_a_byte_is_read(tmp_path: Path) -> None:
    """A kernel answers a close that leaves bytes unread with a reset; had they been read, with a plain end."""
    with waking(tmp_path, trusted=["127.0.0.0/8"]) as woken:
        woken.process.send_signal(signal.SIGSTOP)
        with socket.create_connection((FRIEND, woken.port), WITHIN_S) as client:
            client.sendall(b"x")
            woken.process.send_signal(signal.SIGCONT)
            assert client.recv(100) == b""  # shut down
            machine.wait_for(
                lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EPIPE, "a reset", WITHIN_S,
                every_s=0.01,
            )  # fmt: skip
        woken.wait_for_wakes(1)


def test_crowd_that_stays_connected_holds_nothing_here(tmp_path: Path) -> None:
    """A stranger cannot keep a connection open, nor hold up one who is trusted."""
    with waking(tmp_path, trusted=[f"{FRIEND}/32"]) as woken:
        before = woken.held()
        crowd = []
        for number in range(300):
            client = socket.socket()
            client.bind((f"127.0.5.{1 + number % 200}", 0))
            client.connect((FRIEND, woken.port))
            crowd.append(client)
        poke(woken.port)
        woken.wait_for_wakes(1)
        assert woken.held()[1] == before[1]
        with selectors.DefaultSelector() as selector:
            for client in crowd:
                selector.register(client, selectors.EVENT_READ)
            assert len(selector.select(1.0)) == len(crowd)  # each has been told that it is over
        for client in crowd:
            client.close()


def test_taken_port_is_said_once_and_tried_again(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as other:
        other.bind(("::", 0))
        other.listen()
        with waking(tmp_path, port=other.getsockname()[1], trusted=["127.0.0.0/8"]) as woken:
            assert woken.listens_on == 0
            time.sleep(0.7)  # three more tries
            assert woken.said().count("cannot listen on the wake-up port") == 1
            other.close()
            machine.wait_for(
                lambda: "is open" in woken.said(), "an open port", WITHIN_S, woken.said, every_s=0.02
            )
            poke(woken.port)
            woken.wait_for_wakes(1)


def test_port_0_is_no_port(tmp_path: Path) -> None:
    woken = Woken(tmp_path, 0, ["127.0.0.0/8"])
    try:
        assert woken.listens_on == 0
        fds = [
            os.readlink(f"/proc/{woken.process.pid}/fd/{fd}")
            for fd in os.listdir(f"/proc/{woken.process.pid}/fd")
        ]
        sockets = {fd[8:-1] for fd in fds if fd.startswith("socket:")}
        rows = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        assert not any(line.split()[9] in sockets for line in rows.splitlines() if "inode" not in line)
        assert woken.process.poll() is None
    finally:
        woken.end()


@pytest.fixture
def far(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A network namespace with another machine's address in it: (namespace, the address of this side)."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    name, here, there = f"ipoke{os.getpid()}", f"ipk{os.getpid()}a", f"ipk{os.getpid()}b"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=60)

    try:
        ip("netns", "add", name)
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
    except subprocess.CalledProcessError as error:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"no network namespace here: {error.stderr.decode()[:100]}")
    try:
        for place, device, address in (((), here, "203.0.113.1/24"), (("-n", name), there, "203.0.113.2/24")):
            ip(*place, "addr", "add", address, "dev", device)
            ip(*place, "link", "set", device, "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name, "203.0.113.2"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", here], check=False, capture_output=True)


def test_another_machine_that_is_not_trusted_by_default(far: tuple[str, str], tmp_path: Path) -> None:
    name, address = far
    with waking(tmp_path, trusted=list(PRIVATE), network_namespace=name) as woken:
        for _ in range(20):
            with socket.create_connection((address, woken.port), WITHIN_S) as client:
                assert client.recv(10) == b""
        time.sleep(0.2)
        assert woken.wakes() == []
        words = f"import socket; socket.create_connection(('127.0.0.1', {woken.port}))"
        subprocess.run(["ip", "netns", "exec", name, sys.executable, "-c", words], check=True, timeout=60)
        assert len(woken.wait_for_wakes(1)) == 1


# --- a real agent


async def _agent(place: Place, server: Server, every_s: float = EVERY_S) -> tuple[Agent, Connection, int]:
    port = machine.free_port()
    settings = f"[wake]\nport = {port}\ntrusted = ['{FRIEND}/32']\nevery_s = {every_s}\n"
    place.layout.config.write_text(settings)
    agent = await place.start()
    connection = await server.connection()
    assert connection.hello.wake_port == port
    await connection.expect(Health)
    return agent, connection, port


async def test_real_agent_sends_a_ping_for_a_trusted_poke_and_nothing_for_a_stranger(
    place: Place, server: Server
) -> None:
    server.welcome = Welcome(1, "test", ping_s=300.0, health_s=300.0)  # it says nothing by itself
    agent, connection, port = await _agent(place, server)
    for _ in range(20):
        poke(port, "127.0.1.1", b"hello")
        poke(port, "::1", b"hello")
    with pytest.raises(TimeoutError):
        await connection.expect(Ping, within_s=2 * EVERY_S)
    began = time.monotonic()
    for _ in range(20):
        poke(port)
    took_s = time.monotonic() - began
    for _ in range(2):  # at once, and one for the rest
        await connection.expect(Ping)
    pings = 2 + await _count(connection, 2 * EVERY_S)
    assert pings <= 3 + took_s / EVERY_S  # more on a machine that took its time for them
    await agent.until_said("cannot wake the updater")
    assert agent.said().count("phoning home") == pings
    assert agent.said().count("cannot wake the updater") == 1  # which is not there, and this is said once


async def _count(connection: Connection, quiet_s: float) -> int:
    """How many pings come before it has been quiet for so long."""
    for count in itertools.count():
        try:
            await connection.expect(Ping, within_s=quiet_s)
        except TimeoutError:
            return count
    raise AssertionError


async def test_real_agent_that_waits_connects_when_poked(
    place: Place, server: Server, tmp_path: Path
) -> None:
    agent, _, port = await _agent(place, server, every_s=0.1)
    server_port = server.port
    await server.stop()
    async with asyncio.timeout(60.0):
        while _longest_wait(agent.said()) < 20.0:  # its waits grow
            poke(port)  # a trusted peer cuts each short, too
            await asyncio.sleep(0.3)
    await server.start(tmp_path, server_port)
    begun = time.monotonic()
    poke(port)
    await server.connection()
    assert time.monotonic() - begun < 18.0


def _longest_wait(said: str) -> float:
    """Seconds, of the wait that the agent announced last."""
    waits = re.findall(r"next try in ([0-9.]+) s", said)
    return float(waits[-1]) if waits else 0.0


async def test_real_agent_under_a_scan(place: Place, server: Server) -> None:
    await _agent_scanned(place, server, 3_000)


@pytest.mark.slow
async def test_real_agent_under_100000_connections_with_random_bytes(place: Place, server: Server) -> None:
    await _agent_scanned(place, server, 100_000)


async def _agent_scanned(place: Place, server: Server, count: int) -> None:
    server.welcome = Welcome(1, "test", ping_s=300.0, health_s=300.0)  # it pings for a poke alone
    agent, connection, port = await _agent(place, server)
    await asyncio.to_thread(scan, port, 1_000)
    before = machine.rss(agent.pid), descriptors(agent.pid)
    await asyncio.to_thread(scan, port, count)
    poke(port)
    await connection.expect(Ping)  # its channel has lived through it
    await asyncio.to_thread(machine.wait_for, lambda: "phoning home" in agent.said(), "a poke", WITHIN_S)
    after = machine.rss(agent.pid), descriptors(agent.pid)
    print(f"agent, {count} connections: {before} -> {after} (bytes, descriptors)")
    assert agent.said().count("phoning home") == 1
    assert after[1] == before[1]
    assert after[0] - before[0] <= 512 * 1024
