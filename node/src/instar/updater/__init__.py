"""The updater: owns the slots and the journal, asks the server what is wanted, and drives transactions."""
