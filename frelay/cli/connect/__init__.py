"""``frelay connect``: it connects a local program, port or service to the other function of a route."""
