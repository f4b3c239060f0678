"""how a wish's release comes to its nodes: fetched, through the channel, or by a recovery core"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("wishes", sa.Column("via", sa.String(length=16), server_default="pull", nullable=False))


def downgrade() -> None:
    op.drop_column("wishes", "via")
