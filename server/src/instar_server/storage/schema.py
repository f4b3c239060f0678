"""The tables. Times are unix seconds, digests lower-case hexadecimal, flags 0 or 1.

A change here needs a migration in `migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)  # fmt: skip

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

groups = Table(
    "groups",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("created", Float, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("id", String(18), primary_key=True),
    Column("group_name", ForeignKey("groups.name"), nullable=False, index=True),
    Column("enrolled", Float, nullable=False),
    Column("enrol_key", String(64), nullable=False),  # SHA-256 of the public key of its first certificate
    Column("token", String(16), nullable=False),
    Column("facts", Text, nullable=False, server_default="{}"),
    Column("revoked_at", Float),
    Column("revoked_why", Text, nullable=False, server_default=""),
    Column("generation_floor", Integer, nullable=False, server_default="0"),
    # What was last seen; written in batches.
    Column("last_seen", Float),
    Column("agent_version", String(64), nullable=False, server_default=""),
    Column("agent_digest", String(96), nullable=False, server_default=""),
    Column("agent_built", String(64), nullable=False, server_default=""),
    Column("updater_version", String(64), nullable=False, server_default=""),
    Column("updater_digest", String(96), nullable=False, server_default=""),
    Column("boot_id", String(64), nullable=False, server_default=""),
    Column("os", Text, nullable=False, server_default=""),
    Column("arch", String(64), nullable=False, server_default=""),
    Column("python", String(64), nullable=False, server_default=""),
    Column("health_ok", Integer),
    Column("health", Text, nullable=False, server_default="{}"),
    Column("health_at", Float),
    Column("address", String(64), nullable=False, server_default=""),  # where its channel came from
    Column("wake_port", Integer, nullable=False, server_default="0"),  # TCP; 0: it has none
    # The last transaction that it told of.
    Column("tx", String(100), nullable=False, server_default=""),
    Column("tx_n", Integer, nullable=False, server_default="0"),
    Column("tx_line", String(80), nullable=False, server_default=""),
    Column("tx_phase", String(32), nullable=False, server_default=""),
    Column("tx_version", String(64), nullable=False, server_default=""),
    Column("tx_reason_code", String(64), nullable=False, server_default=""),
    Column("tx_reason_text", Text, nullable=False, server_default=""),
    Column("tx_at", Float),
    # The head of its history.
    Column("chain_n", Integer, nullable=False, server_default="0"),
    Column("chain_hash", String(64), nullable=False, server_default=""),
    # The last entry that was removed because it was old; 0: none was.
    Column("chain_start_n", Integer, nullable=False, server_default="0"),
    Column("chain_start_hash", String(64), nullable=False, server_default=""),
    # Its operating system in two slots, as it told last: JSON, '' for never. Written in batches.
    Column("system", Text, nullable=False, server_default=""),
    Column("system_at", Float),
    Column(
        "cold_boot_at", Float
    ),  # when the system that runs is to prove a cold boot; null: not wanted, or done
    Column("cold_boot_generation", Integer, nullable=False, server_default="0"),
    UniqueConstraint("token", "enrol_key"),
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(40), primary_key=True),  # upper-case hexadecimal, as OpenSSL prints it
    Column("node", ForeignKey("nodes.id"), nullable=False, index=True),
    Column("issued", Float, nullable=False),
    Column("not_after", Float, nullable=False, index=True),
    Column("revoked_at", Float),
)

enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("group_name", ForeignKey("groups.name"), nullable=False),
    Column("uses_left", Integer, nullable=False),
    Column("uses", Integer, nullable=False),
    Column("expires", Float, nullable=False),
    Column("created", Float, nullable=False),
    Column("created_by", String(16), nullable=False),
    Column("label", Text, nullable=False, server_default=""),
    CheckConstraint("uses_left >= 0", name="uses_left"),
)

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("created", Float, nullable=False),
    Column("label", Text, nullable=False, server_default=""),
)

wishes = Table(
    "wishes",
    metadata,
    Column("scope", String(8), primary_key=True),
    Column("subject", String(63), primary_key=True),
    Column("line", String(80), primary_key=True),  # agent | updater | module/<name>
    Column("version", String(64), nullable=False),
    Column("target", Text, nullable=False),
    Column("digest", String(96), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("made", Float, nullable=False),
    Column("made_by", String(16), nullable=False),
    Column("via", String(16), nullable=False, server_default="pull"),  # pull | native | recovery
)

# What operators have asked for and has not ended; of the others nothing is stored.
recoveries = Table(
    "recoveries",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("node", ForeignKey("nodes.id"), nullable=False),
    Column("version", String(64), nullable=False),
    Column("digest", String(96), nullable=False),
    Column("lines", String(80), nullable=False),  # with commas between them
    Column("asked", Float, nullable=False),
)

counters = Table(
    "counters",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", Integer, nullable=False),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("node", ForeignKey("nodes.id"), primary_key=True),
    Column("tx", String(100), primary_key=True),
    Column("phase", String(16), primary_key=True),  # rehearsal | trial
    Column("digest", String(96), nullable=False),
    Column("verdict", String(8), nullable=False),
    Column("code", String(64), nullable=False),
    Column("text", Text, nullable=False),
    Column("at", Float, nullable=False, index=True),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("node", ForeignKey("nodes.id"), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("tx", String(100), nullable=False),
    Column("digest", String(96), nullable=False),
    Column("version", String(64), nullable=False),
    Column("nonce", String(32), nullable=False),
    Column("made", Float, nullable=False, index=True),
    Column("ended", Float),
    Column("result", Text),
)

orders = Table(
    "orders",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("kind", String(8), nullable=False),  # job | command
    Column("name", String(64), nullable=False),  # the module, or the command's type
    Column("version", String(64), nullable=False),
    Column("digest", String(96), nullable=False),
    Column("target", Text, nullable=False),
    Column("args", Text, nullable=False),  # JSON
    Column("selector", Text, nullable=False),  # JSON
    Column("nodes", Integer, nullable=False),  # how many rows it was made with
    Column("deadline_s", Float, nullable=False),
    Column("lapse_at", Float, nullable=False),
    Column("made", Float, nullable=False, index=True),
    Column("made_by", String(16), nullable=False),
    Column("cancelled_at", Float),
    Column("cancelled_by", String(16), nullable=False, server_default=""),
)

order_jobs = Table(
    "order_jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("order_id", ForeignKey("orders.id"), nullable=False),
    Column("node", ForeignKey("nodes.id"), nullable=False),
    Column("state", String(16), nullable=False),
    Column("sends", Integer, nullable=False, server_default="0"),
    Column("sent_at", Float),
    Column("taken_at", Float),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("due_at", Float, index=True),  # when to decide about it; null: it has ended
    Column("ok", Integer),  # the node's own last word; null while there is none
    Column("code", String(64), nullable=False, server_default=""),
    Column("text", Text, nullable=False, server_default=""),
    Column("result", Text),  # JSON, as the node sent it
    Column("output", Text, nullable=False, server_default=""),  # its tail
    UniqueConstraint("order_id", "node"),
    Index("ix_order_jobs_node_state", "node", "state"),
)

events = Table(
    "events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("node", ForeignKey("nodes.id"), nullable=False),
    Column("n", Integer, nullable=False),
    Column("source", String(8), nullable=False),  # node | server
    Column("id", String(120), nullable=False),
    Column("tx", String(100), nullable=False),
    Column("line", String(80), nullable=False),
    Column("phase", String(32), nullable=False),
    Column("version", String(64), nullable=False),
    Column("digest", String(96), nullable=False),
    Column("from_version", String(64), nullable=False),
    Column("reason_code", String(64), nullable=False),
    Column("reason_text", Text, nullable=False),
    Column("wall", Float, nullable=False),
    Column("boot_id", String(64), nullable=False),
    Column("stored_at", Float, nullable=False),
    Column("hash", String(64), nullable=False),
    Column(
        "generation", Integer, nullable=False, server_default="0"
    ),  # of the wish that it is about; 0: none
    Column("slot", String(8), nullable=False, server_default=""),  # of a system image: a | b
    Column("mode", String(16), nullable=False, server_default=""),  # of a system image: none | reboot | kexec
    UniqueConstraint("node", "source", "id"),
    UniqueConstraint("node", "n"),
    sqlite_autoincrement=True,
)

Index("ix_nodes_tx_phase", nodes.c.tx_phase)

system_updates = Table(
    "system_updates",
    metadata,
    Column("id", String(16), primary_key=True),  # os-<12 hex>
    Column("node", ForeignKey("nodes.id"), nullable=False),
    Column("generation", Integer, nullable=False),  # counts with those of the wishes
    Column("name", Text, nullable=False),
    Column("version", String(64), nullable=False),
    Column("digest", String(96), nullable=False),  # of the bundle's manifest
    Column("target", Text, nullable=False),
    Column("source", Text, nullable=False, server_default=""),  # an https URL; '': from the artifacts
    Column("mode", String(8), nullable=False),  # none | reboot | kexec
    Column("override", Integer, nullable=False, server_default="0"),
    Column("made", Float, nullable=False),
    Column("made_by", String(16), nullable=False),
    Column("state", String(16), nullable=False),  # open | confirmed | reverted | cancelled
    # What the node told of it.
    Column("tx", String(100), nullable=False, server_default=""),
    Column("tx_n", Integer, nullable=False, server_default="0"),
    Column("phase", String(32), nullable=False, server_default=""),
    Column("activated", Integer, nullable=False, server_default="0"),
    Column("slot", String(8), nullable=False, server_default=""),
    Column("code", String(64), nullable=False, server_default=""),
    Column("text", Text, nullable=False, server_default=""),
    # Bytes: on the slot, of the image, over the network, from the running slot.
    Column("done", BigInteger, nullable=False, server_default="0"),
    Column("total", BigInteger, nullable=False, server_default="0"),
    Column("fetched", BigInteger, nullable=False, server_default="0"),
    Column("reused", BigInteger, nullable=False, server_default="0"),
    Column("ended", Float),
    UniqueConstraint("node", "generation"),
)

# One at a time of a node, whoever asks, and through whichever process. PostgreSQL's half of it stands in the migration
# alone: an index here that names it loads its dialect (2.2 MiB) into every server.
Index(
    "uq_system_updates_open",
    system_updates.c.node,
    unique=True,
    sqlite_where=system_updates.c.state == "open",
)
