"""Native update: a real agent process takes parcels in blocks from a played server over real TLS."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from instar.agent.native import Native
from instar.core.journal import Begin
from instar.core.transaction import Event, Step
from instar.engine.journal import Journals
from instar.host.clock import Clock
from instar.host.incoming import Incoming
from instar.host.layout import Layout
from instar.wire.codec import decode
from instar.wire.messages import (
    FORCE,
    NEVER,
    Error,
    Health,
    Message,
    Ping,
    Pong,
    UpdateAck,
    UpdateBlock,
    UpdateEnd,
    UpdateHave,
    UpdateOffer,
    UpdateState,
)
from tests.agent.fleet import Connection, Place, Server
from tests.agent.sending import ask, block, finish, send_blocks, transfer, updater
from tests.node.parcels import DIGEST, blocks, offer, parcel

ARCHIVE = os.urandom(300_000)
WHOLE = parcel(ARCHIVE)


def left(place: Place) -> list[str]:
    """What lies among the incoming."""
    folder = place.layout.incoming
    return sorted(os.listdir(folder)) if folder.exists() else []


async def begin(place: Place, server: Server) -> Connection:
    await place.start()
    return await server.connection()


async def test_a_parcel_comes_and_the_updater_is_woken(place: Place, server: Server) -> None:
    async with updater(place) as asked:
        connection = await begin(place, server)
        assert {"native", "recovery"} <= set(connection.hello.features)
        wanted = offer(WHOLE)
        have = await ask(connection, wanted)
        assert (have.digest, have.have) == (place.program.digest, 0)
        assert (have.block, have.window, have.rate_bytes_s) == (4096, 8, 0)
        acks = await send_blocks(connection, have, WHOLE)
        assert all(after - before <= 8 for before, after in pairwise(acks))
        state = await finish(connection, wanted)
        assert (state.state, state.code) == ("received", "")
        async with asyncio.timeout(60):
            assert await asked.get() == {"v": 1, "do": "look"}
    found = Incoming(place.layout.incoming).find("agent", DIGEST)
    assert found is not None
    assert found.archive.read_bytes() == ARCHIVE
    assert left(place) == [wanted.sha384[:24]]


async def test_a_recovery_core_is_kept_and_wakes_nobody(place: Place, server: Server) -> None:
    data = parcel(ARCHIVE, kind="recovery")
    wanted = offer(data, line="recovery", target="recovery/core-1.1.0.pyz")
    async with updater(place) as asked:
        connection = await begin(place, server)
        assert (await ask(connection, wanted)).digest == ""
        assert (await transfer(connection, wanted, data)).state == "received"
        await asyncio.sleep(0.3)
        assert asked.empty()
        again = await ask(
            connection, offer(data, id="u-2", line="recovery", target="recovery/core-1.1.0.pyz")
        )
        assert (again.digest, again.have) == (DIGEST, -(-len(data) // again.block))
    assert Incoming(place.layout.incoming).of_sha384(wanted.sha384) is not None


@pytest.mark.parametrize(("block_size", "window"), [(1024, 1), (131_072, 64), (65_536, 2)])
async def test_every_block_size_and_window(
    place: Place, server: Server, block_size: int, window: int
) -> None:
    place.layout.config.write_text("[native]\nblock = 131072\nwindow = 64\n")
    connection = await begin(place, server)
    wanted = offer(WHOLE, block=block_size, window=window)
    have = await ask(connection, wanted)
    assert (have.block, have.window) == (block_size, window)
    await send_blocks(connection, have, WHOLE)
    assert (await finish(connection, wanted)).state == "received"


async def test_goes_on_after_a_cut(place: Place, server: Server) -> None:
    connection = await begin(place, server)
    have = await ask(connection, offer(WHOLE))
    acked = (await send_blocks(connection, have, WHOLE, until=30))[-1]
    await connection.cut()
    connection = await server.connection()
    wanted = offer(WHOLE, id="u-2")
    again = await ask(connection, wanted)
    assert acked <= again.have <= 30
    await send_blocks(connection, again, WHOLE)
    assert (await finish(connection, wanted)).state == "received"
    assert Incoming(place.layout.incoming).complete()[0].archive.read_bytes() == ARCHIVE


async def test_goes_on_after_kills(place: Place, server: Server) -> None:
    """Killed three times in the middle of it, each time right after a block was sent."""
    have, seen = None, [0]
    for number in range(4):
        agent = await place.start()
        connection = await server.connection()
        wanted = offer(WHOLE, id=f"u-{number}")
        have = await ask(connection, wanted)
        assert have.have >= seen[-1]
        seen = await send_blocks(connection, have, WHOLE, until=have.have + 15) if number < 3 else seen
        if number == 3:
            break
        agent.process.kill()
        await agent.wait()
        connection.over.set()
    assert have is not None
    assert have.have > 0
    await send_blocks(connection, have, WHOLE)
    assert (await finish(connection, wanted)).state == "received"
    assert Incoming(place.layout.incoming).complete()[0].archive.read_bytes() == ARCHIVE


async def test_cut_while_it_is_checked(place: Place, server: Server) -> None:
    """The word is lost; the next offer finds the parcel, or all of its blocks, and gets the word again."""
    data = parcel(os.urandom(8 << 20))
    connection = await begin(place, server)
    wanted = offer(data, block=65_536)
    have = await ask(connection, wanted)
    await send_blocks(connection, have, data)
    await connection.send(UpdateEnd(wanted.id, wanted.sha384))
    await connection.cut()
    connection = await server.connection()
    again = await ask(connection, offer(data, id="u-2", block=65_536))
    assert again.have == -(-len(data) // 65_536)
    assert (await finish(connection, offer(data, id="u-2"))).state == "received"


async def test_a_damaged_part_comes_anew(place: Place, server: Server) -> None:
    connection = await begin(place, server)
    have = await ask(connection, offer(WHOLE))
    await send_blocks(connection, have, WHOLE, until=30)
    await connection.cut()
    connection = await server.connection()
    with Incoming(place.layout.incoming).part(offer(WHOLE).sha384).open("r+b") as part:
        part.write(b"harm")
    state = await transfer(connection, offer(WHOLE, id="u-2"), WHOLE)
    assert (state.state, state.code) == ("failed", "altered-parcel")
    assert left(place) == []
    assert (await transfer(connection, offer(WHOLE, id="u-3"), WHOLE)).state == "received"


@pytest.mark.parametrize(("mode", "digest"), [("auto", "the program's"), ("force", FORCE), ("never", NEVER)])
async def test_modes(place: Place, server: Server, mode: str, digest: str) -> None:
    place.layout.config.write_text(f'[native]\nmode = "{mode}"\nblock = 2048\nwindow = 4\n')
    connection = await begin(place, server)
    have = await ask(connection, offer(WHOLE))
    assert have.digest == (place.program.digest if mode == "auto" else digest)
    assert (have.block, have.window) == (2048, 4)
    await connection.send(block("u-1", 0, WHOLE[:2048]))
    if mode != "never":
        await connection.send(block("u-1", 1, WHOLE[2048:4096]))
        assert (await connection.expect(UpdateAck)).n == 2
        return
    assert (await connection.expect(Error)).code == "no-transfer"
    assert left(place) == []
    core = parcel(ARCHIVE, kind="recovery")  # the way out stays open
    wanted = offer(core, id="u-2", line="recovery", target="recovery/core-1.1.0.pyz")
    assert (await transfer(connection, wanted, core)).state == "received"


async def test_force_is_said_once_for_each_wish(place: Place, server: Server) -> None:
    """By the journals: what was staged for a wish is not forced again, what still waits for its bytes is."""
    place.layout.config.write_text('[native]\nmode = "force"\n')
    await place.start()
    connection = await server.connection()
    assert "native-force" in connection.hello.features

    async def said(number: int, generation: int) -> str:
        wanted = offer(WHOLE, id=f"u-{number}", digest=place.program.digest, generation=generation)
        digest = (await ask(connection, wanted)).digest
        await connection.send(UpdateEnd(wanted.id, wanted.sha384))  # nothing more comes of it
        await connection.expect(UpdateState)
        return digest

    assert await said(1, 6) == FORCE
    journals = Journals(place.layout.journal, Clock())
    begin = Begin("tx-1", "agent", "1.1.0", place.program.digest, "node/x", "", "", "wish", 6, "native")
    place.layout.journal.mkdir(exist_ok=True)
    journal = journals.begin(begin)
    assert await said(2, 6) == FORCE
    journal.intent(Step.STAGE)
    journal.outcome(Step.STAGE, Event.DONE, None, {})
    assert await said(3, 5) == await said(4, 6) == place.program.digest
    assert await said(5, 7) == await said(6, 0) == FORCE


async def test_a_node_that_is_not_forced_does_not_say_so(place: Place, server: Server) -> None:
    place.layout.config.write_text('[native]\nmode = "never"\n')
    await place.start()
    assert "native-force" not in (await server.connection()).hello.features


@pytest.mark.parametrize(
    "line", ['mode = "sometimes"', "block = 100", "window = 65", "rate_bytes_s = -1", "mode = ["]
)
async def test_settings_that_cannot_be_used(place: Place, server: Server, line: str) -> None:
    place.layout.config.write_text(f"[native]\n{line}\n")
    agent = await place.start()
    have = await ask(await server.connection(), offer(WHOLE, block=131_072, window=64))
    assert (have.digest, have.block, have.window) == (place.program.digest, 65_536, 16)
    await agent.until_said("going on with the defaults")


async def test_what_is_installed_is_told_by_line(place: Place, server: Server) -> None:
    release = f"1.2.3-{place.program.digest[:12]}"
    line = place.layout.line("updater")
    (line.releases / release).mkdir(parents=True)
    (line.releases / release / "instar.pyz").write_bytes(place.program.path.read_bytes())
    connection = await begin(place, server)
    assert (await ask(connection, offer(WHOLE, line="updater"))).digest == ""
    line.current.symlink_to(f"releases/{release}")
    have = await ask(connection, offer(WHOLE, line="updater"))  # the same again: the server begins anew
    assert have.digest == place.program.digest


def wrong(data: bytes) -> dict[str, list[Message]]:
    each = blocks(data, 4096)
    return {
        "wrong-block": [block("u-1", 0, each[0]), block("u-1", 2, each[2])],
        "wrong-block past the end": [block("u-1", 1 << 40, each[0])],
        "wrong-block-size": [block("u-1", 0, each[0] + b"x")],
        "wrong-block-size, much too long": [block("u-1", 0, each[0] * 4)],
        "wrong-block-size, short": [block("u-1", 0, each[0][:-1])],
        "bad-encoding": [UpdateBlock("u-1", 0, "!" * 5464)],
        "bad-encoding, not ASCII": [UpdateBlock("u-1", 0, "ä" * 5464)],
        "incomplete-parcel": [block("u-1", 0, each[0]), UpdateEnd("u-1", hashlib.sha384(data).hexdigest())],
        "window-exceeded": [block("u-1", n, each[n]) for n in range(60)],
    }


@pytest.mark.parametrize("case", wrong(WHOLE))
async def test_wrong_blocks_end_it_and_leave_nothing(place: Place, server: Server, case: str) -> None:
    connection = await begin(place, server)
    # A node that paces its answers: else it may well be quicker than the many blocks that are too many.
    rate = 20_000 if case == "window-exceeded" else 0
    await ask(connection, offer(WHOLE, rate_bytes_s=rate))
    for message in wrong(WHOLE)[case]:
        await connection.send(message)
    state = await connection.expect(UpdateState)
    assert (state.id, state.state, state.code) == ("u-1", "failed", case.split(maxsplit=1)[0].rstrip(","))
    assert state.text.startswith("cannot ")
    assert left(place) == []
    await connection.send(block("u-1", 3, WHOLE[:4096]))  # was under way still: dropped
    assert (await transfer(connection, offer(WHOLE, id="u-2"), WHOLE)).state == "received"


async def test_a_repeated_block_changes_nothing(place: Place, server: Server) -> None:
    connection = await begin(place, server)
    wanted = offer(WHOLE)
    have = await ask(connection, wanted)
    await send_blocks(connection, have, WHOLE, until=8)
    while (await connection.expect(UpdateAck)).n < 8:
        pass
    await connection.send(block("u-1", 3, b"x" * 4096))
    assert (await connection.expect(Error)).code == "repeated-block"
    await send_blocks(connection, replace(have, have=8), WHOLE)
    assert (await finish(connection, wanted)).state == "received"


@pytest.mark.parametrize(
    "message", [block("u-1", 0, b"x"), UpdateEnd("u-1", "0" * 96), block("", 0, b"x")], ids=str
)
async def test_what_was_not_announced(place: Place, server: Server, message: Message) -> None:
    connection = await begin(place, server)
    await connection.send(message)
    assert (await connection.expect(Error)).code == "no-transfer"
    assert left(place) == []
    await connection.send(Ping(1))
    await connection.expect(Pong)


@pytest.mark.parametrize(
    "changes",
    [{"line": "module/x"}, {"sha384": "../../x"}, {"length": 0}, {"length": 1 << 50}, {"block": 100},
     {"window": 0}, {"rate_bytes_s": -5}, {"version": "x"}],
)  # fmt: skip
async def test_offers_of_no_use(place: Place, server: Server, changes: dict[str, Any]) -> None:
    connection = await begin(place, server)
    await connection.send(offer(WHOLE, **changes))
    state = await connection.expect(UpdateState)
    assert (state.id, state.state, state.code) == ("u-1", "failed", "bad-offer")
    assert left(place) == []
    assert (await transfer(connection, offer(WHOLE, id="u-2"), WHOLE)).state == "received"


async def test_an_offer_with_an_endless_id(place: Place, server: Server) -> None:
    connection = await begin(place, server)
    await connection.send(offer(WHOLE, id="x" * 201))
    assert (await connection.expect(Error)).code == "bad-offer"


async def test_a_second_offer_is_busy(place: Place, server: Server) -> None:
    connection = await begin(place, server)
    wanted = offer(WHOLE)
    have = await ask(connection, wanted)
    await connection.send(offer(parcel(b"another"), id="u-2"))
    state = await connection.expect(UpdateState)
    assert (state.id, state.state, state.code) == ("u-2", "failed", "busy")
    await send_blocks(connection, have, WHOLE)
    assert (await finish(connection, wanted)).state == "received"


async def test_an_offer_of_what_is_installed_keeps_nobody_out(place: Place, server: Server) -> None:
    connection = await begin(place, server)
    assert (await ask(connection, offer(WHOLE, digest=place.program.digest))).digest == place.program.digest
    assert (await transfer(connection, offer(WHOLE, id="u-2"), WHOLE)).state == "received"


async def test_no_room(place: Place, server: Server) -> None:
    """A file where the folder should be: what no disk can do is told, and the agent goes on."""
    place.layout.incoming.write_text("in the way")
    connection = await begin(place, server)
    await connection.send(offer(WHOLE))
    assert (await connection.expect(UpdateState)).state == "failed"
    place.layout.incoming.unlink()
    assert (await transfer(connection, offer(WHOLE, id="u-2"), WHOLE)).state == "received"


async def test_the_cap_holds(place: Place, server: Server) -> None:
    place.layout.config.write_text("[native]\nrate_bytes_s = 200000\n")
    connection = await begin(place, server)
    wanted = offer(WHOLE)
    have = await ask(connection, wanted)
    assert have.rate_bytes_s == 200_000
    began = time.monotonic()
    await send_blocks(connection, have, WHOLE)
    assert time.monotonic() - began >= (len(WHOLE) - have.window * have.block) / 200_000 * 0.9


async def test_what_is_called_off_or_wrong_is_answered_at_once_under_a_low_cap(
    place: Place, server: Server
) -> None:
    """An acknowledgement may be held back for ten seconds: who calls it off does not wait for so long."""
    place.layout.config.write_text("[native]\nrate_bytes_s = 1024\n")
    connection = await begin(place, server)
    for number, code in enumerate(("incomplete-parcel", "wrong-block")):
        wanted = offer(WHOLE, id=f"u-{number}", block=10_240)
        have = await ask(connection, wanted)
        assert (have.have, have.block, have.window) == (0, 10_240, 1)
        await connection.send(block(wanted.id, 0, WHOLE[: have.block]))
        await asyncio.sleep(0.3)
        wrong = block(wanted.id, 7, b"") if number else UpdateEnd(wanted.id, wanted.sha384)
        await connection.send(wrong)
        state = await connection.expect((UpdateState, UpdateAck))  # type: ignore[arg-type]
        assert isinstance(state, UpdateState), "it came only after the acknowledgement"
        assert (state.id, state.state, state.code) == (wanted.id, "failed", code)
    assert left(place) == []


async def test_the_channel_answers_meanwhile_and_memory_stays(place: Place, server: Server) -> None:
    data = parcel(os.urandom(48 << 20))
    agent = await place.start()
    connection = await server.connection()
    await connection.expect(Health)
    first = offer(WHOLE, id="u-0")
    assert (await transfer(connection, first, WHOLE)).state == "received"
    before = peak_kib(agent.pid)
    wanted = offer(data, block=65_536, window=16)
    have = await ask(connection, wanted)
    each, acked, sent, slowest, pongs = blocks(data, have.block), 0, 0, 0.0, 0
    asked: dict[int, float] = {}
    async with asyncio.timeout(180):
        while acked < len(each):
            while sent < min(len(each), acked + have.window):
                await connection.send(block(have.id, sent, each[sent]))
                sent += 1
                if sent % 50 == 0:
                    asked[sent] = time.monotonic()
                    await connection.send(Ping(sent))
            came = decode((await connection.socket.receive()).data)
            if isinstance(came, UpdateAck):
                acked = came.n
            elif isinstance(came, Pong):
                assert acked <= came.n, "it was answered after blocks that were sent later"
                pongs += 1
                slowest = max(slowest, time.monotonic() - asked.pop(came.n))
    assert (await finish(connection, wanted)).state == "received"
    after = peak_kib(agent.pid)
    print(f"slowest pong {slowest:.3f} s, peak {before} -> {after} KiB")
    assert pongs >= len(each) // 50 - 1
    assert after - before < 6 * 1024


def peak_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM line")


# --- without a network: what takes a minute otherwise


class Said(list[Message]):
    """Messages that were sent."""

    def send(self, message: Message) -> bool:
        self.append(message)
        return True

    async def until(self, kind: type[Message]) -> Any:
        async with asyncio.timeout(60):
            while not (found := [each for each in self if isinstance(each, kind)]):
                await asyncio.sleep(0.01)
        return found[-1]


async def test_silence_lets_it_go_and_the_part_stays(short_folder: Path) -> None:
    layout, said, lines = Layout(short_folder), Said(), list[str]()
    loop = asyncio.get_running_loop()
    native = Native(layout, DIGEST, said.send, lines.append, loop.time, silence_s=1.5)
    task = asyncio.create_task(native.run())
    wanted: UpdateOffer = offer(WHOLE)
    native.take(wanted)
    await said.until(UpdateHave)
    for n, data in enumerate(blocks(WHOLE, 4096)[:4]):
        native.take(block("u-1", n, data))
    state = await said.until(UpdateState)
    assert (state.state, state.code) == ("failed", "nothing-came")
    assert Incoming(layout.incoming).part(wanted.sha384).stat().st_size == 4 * 4096
    said.clear()
    native.take(offer(WHOLE, id="u-2"))
    assert (await said.until(UpdateHave)).have == 4
    task.cancel()


async def test_silence_after_an_offer_of_what_is_installed_is_no_fault(short_folder: Path) -> None:
    """Nothing was to come: nobody is told, or warned, of a failure."""
    said = Said()
    loop = asyncio.get_running_loop()
    native = Native(Layout(short_folder), DIGEST, said.send, [].append, loop.time, silence_s=0.2)
    task = asyncio.create_task(native.run())
    native.take(offer(WHOLE))
    assert (await said.until(UpdateHave)).digest == DIGEST
    await asyncio.sleep(0.6)
    assert [type(each) for each in said] == [UpdateHave]
    native.take(offer(WHOLE, id="u-2", digest="cd" * 48))
    async with asyncio.timeout(60):
        while len(said) < 2:
            await asyncio.sleep(0.01)
    assert [each.id for each in said if isinstance(each, UpdateHave)] == ["u-1", "u-2"]
    task.cancel()
