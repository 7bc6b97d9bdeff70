"""Serve an ASGI app in a function that nobody can dial: uvicorn, behind a frelay listener.

    python serve.py MODULE:APP RELAY:PORT

with FRELAY_CERT, FRELAY_KEY, FRELAY_CA and FRELAY_PEER in the environment.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

import uvicorn

import frelay


async def serve(app: str, relay: str, **options: str) -> None:
    """Serve ``app`` to the callers that the relay brings, until SIGTERM. ``options`` are those of ``frelay.listen``."""
    # Only this user may enter the directory, so the app has no callers but ours.
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/app.sock"
        server = uvicorn.Server(uvicorn.Config(app, uds=path))
        serving = asyncio.create_task(server.serve())
        while not (server.started or serving.done()):  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.01)

        async def on_caller(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                app_reader, app_writer = await asyncio.open_unix_connection(path)
            except OSError:
                writer.transport.abort()  # the app is about to end
            else:
                await join(reader, writer, app_reader, app_writer)

        # In place of uvicorn's handlers, which would end this process before the callers have left.
        stopped = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        start_server = frelay.client.asyncio.start_server
        async with await start_server(on_caller, relay, on_error=report, standing=4, **options) as listener:
            listening = asyncio.create_task(listener.serve_forever())
            stopping = asyncio.create_task(stopped.wait())
            await asyncio.wait([serving, listening, stopping], return_when=asyncio.FIRST_COMPLETED)
            listener.close()  # no further callers
            server.should_exit = True  # uvicorn answers the requests that it has
            await serving
            listener.close_clients()
            await asyncio.wait([listening])
        stopping.cancel()
        if not listening.cancelled():
            listening.result()  # raises the error that has ended the listener


async def join(
    wire_reader: asyncio.StreamReader,
    wire_writer: asyncio.StreamWriter,
    app_reader: asyncio.StreamReader,
    app_writer: asyncio.StreamWriter,
) -> None:
    """Copy both directions to their ends. If one side breaks, cut the other: what came is not complete."""
    try:
        async with asyncio.TaskGroup() as directions:
            directions.create_task(copy(wire_reader, app_writer))
            directions.create_task(copy(app_reader, wire_writer))
    except* OSError:
        wire_writer.transport.abort()
        app_writer.transport.abort()
    finally:
        wire_writer.close()
        app_writer.close()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction, and then end it."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


def report(error: frelay.FrelayError) -> None:
    """Say what the listener has outlived: a caller with a wrong name, a relay that was away."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    names = ("cert", "key", "ca", "peer")
    asyncio.run(serve(*sys.argv[1:3], **{name: os.environ[f"FRELAY_{name.upper()}"] for name in names}))
