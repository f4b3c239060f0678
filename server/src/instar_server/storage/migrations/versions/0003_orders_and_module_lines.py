"""orders with a row for each node; lines of modules; where a node can be woken"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SHORT, LONG = sa.String(length=16), sa.String(length=80)


def upgrade() -> None:
    _orders()
    op.add_column("nodes", sa.Column("address", sa.String(length=64), server_default="", nullable=False))
    op.add_column("nodes", sa.Column("wake_port", sa.Integer(), server_default="0", nullable=False))
    _lines(SHORT, LONG)


def downgrade() -> None:
    _lines(LONG, SHORT)
    op.drop_column("nodes", "wake_port")
    op.drop_column("nodes", "address")
    op.drop_table("order_jobs")
    op.drop_table("orders")


def _orders() -> None:
    op.create_table(
        "orders",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=96), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("args", sa.Text(), nullable=False),
        sa.Column("selector", sa.Text(), nullable=False),
        sa.Column("nodes", sa.Integer(), nullable=False),
        sa.Column("deadline_s", sa.Float(), nullable=False),
        sa.Column("lapse_at", sa.Float(), nullable=False),
        sa.Column("made", sa.Float(), nullable=False),
        sa.Column("made_by", sa.String(length=16), nullable=False),
        sa.Column("cancelled_at", sa.Float(), nullable=True),
        sa.Column("cancelled_by", sa.String(length=16), server_default="", nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_orders")),
    )
    op.create_index(op.f("ix_orders_made"), "orders", ["made"])
    op.create_table(
        "order_jobs",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("order_id", sa.String(length=40), nullable=False),
        sa.Column("node", sa.String(length=18), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("sends", sa.Integer(), server_default="0", nullable=False),
        sa.Column("sent_at", sa.Float(), nullable=True),
        sa.Column("taken_at", sa.Float(), nullable=True),
        sa.Column("started_at", sa.Float(), nullable=True),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.Column("due_at", sa.Float(), nullable=True),
        sa.Column("ok", sa.Integer(), nullable=True),
        sa.Column("code", sa.String(length=64), server_default="", nullable=False),
        sa.Column("text", sa.Text(), server_default="", nullable=False),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("output", sa.Text(), server_default="", nullable=False),
        sa.ForeignKeyConstraint(["order_id"], ["orders.id"], name=op.f("fk_order_jobs_order_id")),
        sa.ForeignKeyConstraint(["node"], ["nodes.id"], name=op.f("fk_order_jobs_node")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_order_jobs")),
        sa.UniqueConstraint("order_id", "node", name=op.f("uq_order_jobs_order_id_node")),
    )
    op.create_index(op.f("ix_order_jobs_due_at"), "order_jobs", ["due_at"])
    op.create_index("ix_order_jobs_node_state", "order_jobs", ["node", "state"])


def _lines(old: sa.String, new: sa.String) -> None:
    """SQLite changes a column's type by copying the table, and heeds no length; others do."""
    connection = op.get_bind()
    given_out = (
        connection.execute(sa.text("SELECT seq FROM sqlite_sequence WHERE name = 'events'")).scalar() or 0
    )
    for table, column, more in (
        ("wishes", "line", {}),
        ("nodes", "tx_line", {}),
        ("events", "line", {"sqlite_autoincrement": True}),
    ):
        with op.batch_alter_table(table, table_kwargs=more) as batch:
            default = "" if table == "nodes" else None
            batch.alter_column(
                column, existing_type=old, type_=new, existing_nullable=False, existing_server_default=default
            )
    # A copy knows only the numbers that are left in it; one that was given out is never given again.
    keep = sa.text("UPDATE sqlite_sequence SET seq = :seq WHERE name = 'events' AND seq < :seq")
    connection.execute(keep, {"seq": given_out})
