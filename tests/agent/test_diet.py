"""What the resident must not carry, and how much memory it may take. Measured on the real process."""

from __future__ import annotations

import asyncio
import json
import zipfile
from pathlib import Path

from instar.wire.messages import Health
from instar_lab.program import build
from tests.agent.fleet import VERSION, Place, Server

CEILING_KIB = 24 * 1024 + 512
FORBIDDEN = (
    "argparse",
    "concurrent.futures.process",
    "cryptography",
    "ctypes",
    "datetime",
    "email",
    "h11",
    "http.client",
    "instar.agent.aside",
    "instar.agent.command",  # command_store, commands
    "instar.agent.native",
    "instar.agent.recovery",
    "instar.agent.service",
    "instar.agent.supervisor",
    "instar.engine",
    "instar.host.blocks",
    "instar.host.incoming",
    "instar.host.parcel",
    "instar.host.rescue",
    "instar.oneshot",
    "instar.runner",
    "instar.targets",
    "instar.updater",
    "logging.config",
    "multiprocessing",
    "random",
    "securesystemslib",
    "stringprep",
    "tarfile",
    "tomllib",
    "tuf",
    "urllib.request",
    "urllib3",
    "wsproto",
    "xml",
)
TELL = """
import json, os, sys
def start(argv):
    if argv[0] == "agent":
        place = argv[argv.index("--state") + 1]
        leave = os._exit
        def tell(status):
            with open(os.path.join(place, "modules.json"), "w") as file:
                json.dump(sorted(sys.modules), file)
            leave(status)
        os._exit = tell
"""


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("no Rss line")


async def test_memory_while_idle(place: Place, server: Server) -> None:
    agent = await place.start()
    connection = await server.connection()
    await connection.expect(Health)
    await asyncio.sleep(0.5)
    rss = resident_kib(agent.pid)
    print(f"idle agent: {rss} KiB resident")
    assert rss < CEILING_KIB


async def test_modules_that_are_not_loaded(place: Place, server: Server, tmp_path: Path) -> None:
    """The same program, with a wrapper that writes sys.modules down at its end."""
    telling = tmp_path / "telling.pyz"
    build.write(build.build(VERSION, wrap=TELL), telling)
    assert "instar_lab_wrapper.py" in zipfile.ZipFile(telling).namelist()
    agent = await place.start(program=telling)
    connection = await server.connection()
    await connection.expect(Health)
    agent.process.terminate()
    assert await agent.wait() == 0
    loaded = json.loads((place.layout.state / "modules.json").read_text())
    assert "instar.wire.websocket" in loaded
    assert [name for name in loaded if name.startswith(FORBIDDEN)] == []
