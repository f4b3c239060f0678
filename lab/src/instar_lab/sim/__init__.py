"""Simulated agents: thousands of real connections from one process, to load a real server."""
