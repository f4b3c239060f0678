"""Building the node program, whole ones and broken ones."""
