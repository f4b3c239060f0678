"""`instar-lab update-test`: updates this machine's agent over and over, against a server of its own (M6)."""
