"""A machine with two slots: 1.0.0 runs, 1.1.0 is on offer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.slots.images import Image
from tests.node.slots.system import System


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, Image, Image]:
    folder = tmp_path_factory.mktemp("images")
    return Image(folder, "1.0.0", 2), Image(folder, "1.1.0", 3), Image(folder, "1.2.0", 4)


@pytest.fixture
def system(memory: Path, images: tuple[Image, ...]) -> Iterator[System]:
    made = System(memory / "s", images[0], images[1])
    made.power_on()
    yield made
    made.close()
