"""What the server does, apart from how it is asked: each service is one subject."""
