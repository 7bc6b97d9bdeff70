"""The client for Trio code: :func:`connect` returns a stream, and :func:`listen` a listener that gives out streams.

:func:`group` joins the functions of one job.

Only this package of the client needs more than the standard library.
"""

from __future__ import annotations

from frelay.client.trio.connecting import connect, join
from frelay.client.trio.grouping import TrioGroup, group
from frelay.client.trio.listening import TrioListener, listen
from frelay.client.trio.wire import TrioWire

__all__ = ["TrioGroup", "TrioListener", "TrioWire", "connect", "group", "join", "listen"]
