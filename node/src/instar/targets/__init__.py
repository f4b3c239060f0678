"""The things that can be replaced, each behind `instar.engine.target.Target`. They do not know each other."""
