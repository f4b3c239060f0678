"""`make bench`: measure, print a table, write docs/performance.md."""
