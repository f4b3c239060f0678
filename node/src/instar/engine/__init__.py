"""The transaction's driver, its journal on the disk, and fetching; no particular thing that is replaced."""
