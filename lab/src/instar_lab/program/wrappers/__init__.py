"""Modules that a broken program carries as `instar_lab_wrapper` and starts before anything else.

Each one is complete in itself: it is copied into the program as text. So what is shipped has no hook
for tests, and what is tested is a real build with one more module.
"""
