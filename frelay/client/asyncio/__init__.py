"""The client for asyncio code. Standard library only.

:func:`connect` returns a (reader, writer) pair, and :func:`start_server` calls back with such a pair for each caller.
:func:`group` joins the functions of one job.
"""

from __future__ import annotations

from frelay.client.asyncio.connecting import connect
from frelay.client.asyncio.grouping import AsyncioGroup, group
from frelay.client.asyncio.listening import Server, start_server
from frelay.client.asyncio.wire import WireTransport

__all__ = ["AsyncioGroup", "Server", "WireTransport", "connect", "group", "start_server"]
