"""A system image on its way into the slot that does not run."""
