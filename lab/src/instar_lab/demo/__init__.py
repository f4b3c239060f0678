"""The demo: real nodes move from release to release, come back from five bad ones, and lose no job in restarts."""
