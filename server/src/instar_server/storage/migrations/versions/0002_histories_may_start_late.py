"""histories may start late: old events are removed, and where a chain starts is kept with its node"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Plain additions: SQLite does them in place, without copying the table.
    op.add_column("nodes", sa.Column("chain_start_n", sa.Integer(), server_default="0", nullable=False))
    op.add_column(
        "nodes", sa.Column("chain_start_hash", sa.String(length=64), server_default="", nullable=False)
    )


def downgrade() -> None:
    op.drop_column("nodes", "chain_start_hash")
    op.drop_column("nodes", "chain_start_n")
