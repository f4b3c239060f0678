"""Instar: a node's agent, updater, launcher, runner and command line in one program."""
