"""Bytes to messages and back. No I/O. The server decodes the same dataclasses."""
