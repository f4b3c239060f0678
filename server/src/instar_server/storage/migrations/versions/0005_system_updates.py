"""updates of a node's operating system, what nodes tell of their slots, and cold boots that are wanted"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def _text(name: str, length: int = 0) -> sa.Column[str]:
    kind = sa.String(length=length) if length else sa.Text()
    return sa.Column(name, kind, server_default="", nullable=False)


def _number(name: str, kind: type[sa.Integer] = sa.Integer) -> sa.Column[int]:
    return sa.Column(name, kind(), server_default="0", nullable=False)


def upgrade() -> None:
    op.add_column("nodes", _text("system"))
    op.add_column("nodes", sa.Column("system_at", sa.Float(), nullable=True))
    op.add_column("nodes", sa.Column("cold_boot_at", sa.Float(), nullable=True))
    op.add_column("nodes", _number("cold_boot_generation"))
    op.add_column("events", _number("generation"))
    op.add_column("events", _text("slot", 8))
    op.add_column("events", _text("mode", 16))
    op.create_table(
        "system_updates",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("node", sa.String(length=18), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=96), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        _text("source"),
        sa.Column("mode", sa.String(length=8), nullable=False),
        _number("override"),
        sa.Column("made", sa.Float(), nullable=False),
        sa.Column("made_by", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        _text("tx", 100),
        _number("tx_n"),
        _text("phase", 32),
        _number("activated"),
        _text("slot", 8),
        _text("code", 64),
        _text("text"),
        _number("done", sa.BigInteger),
        _number("total", sa.BigInteger),
        _number("fetched", sa.BigInteger),
        _number("reused", sa.BigInteger),
        sa.Column("ended", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["node"], ["nodes.id"], name=op.f("fk_system_updates_node_nodes")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_system_updates")),
        sa.UniqueConstraint("node", "generation", name=op.f("uq_system_updates_node_generation")),
    )
    op.create_index(
        "uq_system_updates_open",
        "system_updates",
        ["node"],
        unique=True,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )


def downgrade() -> None:
    op.drop_table("system_updates")
    for name in ("generation", "slot", "mode"):
        op.drop_column("events", name)
    for name in ("system", "system_at", "cold_boot_at", "cold_boot_generation"):
        op.drop_column("nodes", name)
