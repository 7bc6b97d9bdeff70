"""What an operator sees and changes while the relay runs: the admin API, the dashboard, the metrics.

``model``      the shapes of all that is told or asked for, as JSON; documented, and stable
``control``     what the servers may ask of a relay; the relay itself is not known here
``api``        the HTTP interface, and who may not use it
``dashboard``  the page at its ``/``, and the headers that keep it harmless
``door``       mutual TLS in front of it, where it listens on TCP
``server``     running an ASGI application on a socket beside a relay that must not suffer from it

Nothing in here is loaded by a relay that has neither ``[admin]`` nor ``[metrics]``.
"""
