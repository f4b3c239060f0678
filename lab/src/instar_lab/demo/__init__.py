"""The demo: real nodes move from release to release, and come back from five bad ones."""
