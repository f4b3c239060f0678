"""The resident agent: control channel, jobs, local API. It knows nothing about how updates are installed.

Import diet: standard library alone; no http.client, ctypes, tuf or crypto library.
tests/agent/test_diet.py starts the real process and checks it.
"""
