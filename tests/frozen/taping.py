"""How the recordings between real nodes and a real server were made. Kept to be read, like making.py.

python -m tests.frozen.taping FOLDER
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from instar.core.errors import MachineError
from instar_lab import machine
from instar_lab.node import Node
from instar_lab.program import build
from instar_lab.server import LabServer
from tests.e2e import mirror
from tests.e2e.mirror import Mirror, Reader, Writer
from tests.frozen.making import VERSION, core_release


class Tape(Mirror):
    """Stands between, and keeps every text frame as (from, text), blocks without their data."""

    def __init__(self, gateway: tuple[str, int], certificate: Path, ca: Path) -> None:
        self.sessions: list[list[tuple[str, str]]] = []
        super().__init__(gateway, certificate, ca)

    async def serve(self, reader: Reader, writer: Writer) -> None:
        head = await mirror._head(reader)
        request = await mirror._request(head, reader)
        upstream = await asyncio.open_connection(*self.gateway, ssl=self._out)
        upstream[1].write(head + request.body)
        if "upgrade" not in request.headers:
            await mirror._both(reader, writer, *upstream)  # one answer after the other, as they come
            return
        frames: list[tuple[str, str]] = []
        self.sessions.append(frames)
        writer.write(await mirror._head(upstream[0]))
        copies = (_copy(frames, "node", reader, upstream[1]), _copy(frames, "server", upstream[0], writer))
        tasks = [asyncio.ensure_future(copy) for copy in copies]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


async def _copy(frames: list[tuple[str, str]], who: str, source: Reader, sink: Writer) -> None:
    while True:
        try:
            head = await source.readexactly(2)
        except (OSError, asyncio.IncompleteReadError):
            return
        size = head[1] & 0x7F
        if size > 125:
            more = await source.readexactly(2 if size == 126 else 8)
            head, size = head + more, int.from_bytes(more, "big")
        mask = await source.readexactly(4) if head[1] & 0x80 else b""
        data = await source.readexactly(size)
        sink.write(head + mask + data)
        if head[0] & 0xF == 1:
            text = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data)) if mask else data
            frames.append((who, elided(text.decode())))


def elided(text: str) -> str:
    body = json.loads(text)
    if body["t"] != "update-block":
        return text
    return json.dumps({**body, "data": f"({len(body['data'])} characters)"}, separators=(",", ":"))


def said(tape_: Tape, kind: str) -> list[tuple[str, str]]:
    """The session in which a message of that type came; [] for none."""
    found = (each for each in tape_.sessions if any(f'"t":"{kind}"' in text for _, text in each))
    return list(next(found, []))


def tape(role: str, folder: Path) -> list[tuple[str, str]]:
    server = LabServer(folder / "server")
    server.create()
    with server.layout.config.open("a") as file:
        file.write("look_floor_s = 0.2\n")
    server.start()
    program = build.build(VERSION)
    node = Node(folder / "n")
    try:
        server.publish(program)
        server.publish_release(core_release())
        handed = folder / "instar.pyz"
        server.hand_out(program, server.token(1), handed)
        node.install(handed, start=False)
        tape_ = Tape(server.gateway(), server.layout.certificate, server.ca)
        tape_.stand_before(node.layout)
        if role == "beacon":
            shutil.rmtree(node.layout.line("agent").folder)
        with contextlib.suppress(MachineError):
            node.cli("start")
        if role == "agent":
            machine.wait_for(lambda: said(tape_, "welcome"), "a welcome", 20.0)
            server.api.post(f"/nodes/{node.id}/recover", {"version": VERSION, "lines": ["agent"]})

        machine.wait_for(lambda: said(tape_, "agentupdate-ended"), "an end", 60.0, node.logs)
        machine.pause(1.0)
        frames = said(tape_, "agentupdate-ended")
        tape_.close()
        return frames
    finally:
        server.close()
        node.end()


def main(into: Path) -> None:
    for role in ("agent", "beacon"):
        folder = Path(tempfile.mkdtemp(prefix="ie-tape-", dir="/tmp"))
        try:
            frames = tape(role, folder)
        finally:
            machine.end_all_naming(folder, grace_s=0.5)
            shutil.rmtree(folder, ignore_errors=True)
        about = {"about": f"a real {role} and a real server of Instar {VERSION}, protocol version 1"}
        lines = [json.dumps(about), *(json.dumps({"from": who, "frame": text}) for who, text in frames)]
        (into / f"{role}-and-server-1.0.0.jsonl").write_text("\n".join(lines) + "\n")
        print(role, len(frames), "frames")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
