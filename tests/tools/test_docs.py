"""Documents that are made from the code say what the code says."""

from __future__ import annotations

import re

import pytest

from instar.core.settings import BOUNDS
from instar.core.transaction import Step
from instar_lab import docs
from instar_lab.kills.document import headings
from instar_lab.kills.table import DOCUMENT


def test_the_transaction_document_is_the_table() -> None:
    assert docs.TRANSACTION.read_text() == docs.transaction(), "run: python -m instar_lab.docs"


def test_the_document_on_restarts_is_the_tables() -> None:
    assert docs.LIFECYCLE.read_text() == docs.modules_lifecycle(), "run: python -m instar_lab.docs"


def test_every_setting_is_documented() -> None:
    text = (docs.ROOT / "docs" / "configuration.md").read_text()
    missing = [key for key in [*BOUNDS, "network.proxy"] if f"`{key}`" not in text]
    assert not missing


def test_the_kill_points_name_every_step() -> None:
    text = DOCUMENT.read_text()
    for step in Step:
        for side in ("before", "after"):
            assert f"journal:{step.value}:intent:{side}" in text
            assert f"step:{step.value}:before" in text


def test_the_kill_points_have_every_scenario() -> None:
    text = DOCUMENT.read_text()
    assert not [heading for heading in headings().values() if heading not in text]


def test_the_readme_names_every_document() -> None:
    text = (docs.ROOT / "README.md").read_text()
    assert not [path.name for path in (docs.ROOT / "docs").glob("*.md") if f"](docs/{path.name})" not in text]


@pytest.mark.parametrize(
    "name", [*sorted(str(p.relative_to(docs.ROOT)) for p in docs.ROOT.glob("docs/*.md")), "README.md"]
)
def test_links_lead_somewhere(name: str) -> None:
    path = docs.ROOT / name
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]
