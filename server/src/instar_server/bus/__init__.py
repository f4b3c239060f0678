"""Wakes and routes messages between the parts of the server. The truth is in the database, never here."""
