"""The updater's HTTP API (requirement D1): HTTP/1.1 over the local Unix socket, and over TLS on `[updater] api`.

`listener` is all that is in memory while nobody calls; the first call brings the rest.
"""
