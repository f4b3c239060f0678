"""A small system with two slots, for tests: built from Debian packages without loop mounts, run under QEMU."""
