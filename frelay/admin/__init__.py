"""HTTP for operators: the admin API, the dashboard and the metrics.

``control``      what the servers may ask of a relay, as an abstract class; this room does not know the relay
``model``        the shapes of requests and answers, as JSON; documented and stable
``api``          the paths of the admin API
``problems``     its error answers
``events``       its event stream
``guard``        the checks of Host, Origin and body size in front of it
``mtls``         mutual TLS in front of it, where it listens on TCP
``dashboard``    the page at ``/`` of the API, and its security headers
``metrics``      ``/metrics``, ``/healthz`` and ``/readyz``
``sharing``      one scrape for all who ask at the same time
``loop_lag``     how late the event loop is
``servers``      the two servers of one relay: binds their sockets and runs them
``server``       one ASGI application on listening sockets
``connections``  how many connections it has, and which one is closed to make room
``http``         HTTP/1.1 on one connection

A relay without ``[admin]`` and ``[metrics]`` does not load this room, except for the shapes that its workers need.
"""
