"""Kills a real node at every named point of an update, and looks what runs afterwards."""
