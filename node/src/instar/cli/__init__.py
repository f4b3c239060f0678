"""The node's command line: what a person types on the machine."""
