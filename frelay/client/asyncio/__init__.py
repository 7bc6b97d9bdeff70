"""The client for asyncio code: :func:`connect` returns a (reader, writer) pair. Standard library only."""

from __future__ import annotations

from frelay.client.asyncio.connecting import connect
from frelay.client.asyncio.wire import WireTransport

__all__ = ["WireTransport", "connect"]
