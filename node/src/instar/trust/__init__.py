"""What is trusted, and why, as pure functions of bytes. Standard library only: residents import it."""
