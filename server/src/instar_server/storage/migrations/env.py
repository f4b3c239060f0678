"""Alembic's entry: works on the connection that `storage.migrate` hands in."""

from __future__ import annotations

from alembic import context

from instar_server.storage.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
