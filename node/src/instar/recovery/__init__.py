"""What must work when everything newer is broken. Bare standard library, and of ours only `core`, `host`."""
