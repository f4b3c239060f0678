"""recoveries that operators asked for go on after a restart; when a node's program was built"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "recoveries",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("node", sa.String(length=18), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=96), nullable=False),
        sa.Column("lines", sa.String(length=80), nullable=False),
        sa.Column("asked", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["node"], ["nodes.id"], name=op.f("fk_recoveries_node_nodes")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_recoveries")),
    )
    op.add_column("nodes", sa.Column("agent_built", sa.String(length=64), server_default="", nullable=False))


def downgrade() -> None:
    op.drop_column("nodes", "agent_built")
    op.drop_table("recoveries")
