"""The nodes' port: mutual TLS, the control channel, enrolment, artifacts (docs/protocol.md)."""
