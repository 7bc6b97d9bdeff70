"""``frelay connect``: a local program, port or service, joined to a route."""
