"""What runs inside: shell for the initial file system, Python for process 1."""
