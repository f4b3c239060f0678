"""Rules without I/O, clock or chance: what the transaction is and what comes next."""
