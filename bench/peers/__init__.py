"""`make bench ARGS=--peers`: what others do on this machine, in the same run as ours."""
