"""The recovery core's program: the whole update logic in one small file, for a node whose own is broken (M5)."""
