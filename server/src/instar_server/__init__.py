"""The server of a fleet: gateway for nodes, API for operators, scheduler; one process on SQLite."""

VERSION = "1.0.0"
