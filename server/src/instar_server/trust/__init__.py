"""Signing and publishing releases: the TUF repository, its keys and the tools that work offline."""
