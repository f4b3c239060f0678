"""The transaction's driver, its journal on the disk, and fetching. Knows no particular thing that is replaced."""
