"""One of the two functions of ``frelay demo``, in a process of its own: an example of a user's function.

It reports each step as a JSON line on stdout, and ``frelay.cli.demo`` prints it. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any, Final

import frelay
from frelay.client.wire import Wire
from frelay.protocol.messages import Message, Paired, Waiting

__all__ = ["main"]

_CHUNK: Final = 1024 * 1024


def _say(step: str, **facts: Any) -> None:
    print(json.dumps({"step": step, **facts}), flush=True)


def _on_status(message: Message) -> None:
    if isinstance(message, Waiting):
        _say("waiting", identity=message.identity, peer_seen=message.peer_seen)
    elif isinstance(message, Paired):
        _say("paired", peer=message.peer, role=message.role, pairing=message.pairing)


def _send_bulk(wire: Wire, size: int, seed: bytes) -> str:
    """Send ``size`` bytes that depend on ``seed``; returns their SHA-256."""
    block = hashlib.sha256(seed).digest() * (_CHUNK // 32)
    sha = hashlib.sha256()
    for _ in range(size // _CHUNK):
        wire.sendall(block)
        sha.update(block)
    return sha.hexdigest()


def _receive(wire: Wire, size: int) -> bytes:
    parts = []
    while size:
        data = wire.recv(min(size, _CHUNK))
        if not data:
            raise EOFError(f"the other function ended with {size} bytes missing")
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _receive_bulk(wire: Wire, size: int) -> str:
    sha = hashlib.sha256()
    while size:
        data = _receive(wire, min(size, _CHUNK))
        sha.update(data)
        size -= len(data)
    return sha.hexdigest()


def main() -> None:
    """Join, greet, send bulk data both ways, and close cleanly."""
    settings = json.loads(sys.argv[1])
    name, size = settings["name"], settings["size"]
    _say("dialling", address=settings["address"])
    with frelay.connect(
        settings["address"],
        cert=settings["cert"],
        key=settings["key"],
        ca=settings["ca"],
        peer=settings["peer"],
        wait=30,
        on_status=_on_status,
    ) as wire:
        cipher = wire.cipher()
        _say("connected", peer=settings["peer"], version=wire.version(), cipher=cipher[0] if cipher else None)
        wire.sendall(f"hello from {name}".encode().ljust(64))
        _say("greeted", text=_receive(wire, 64).decode().strip())
        # One direction after the other: two threads must not use one SSLSocket at once.
        sent = _send_bulk(wire, size, b"forth") if name == "func1" else ""
        began = time.perf_counter()
        received = _receive_bulk(wire, size)
        seconds = time.perf_counter() - began
        sent = sent or _send_bulk(wire, size, b"back")
        _say("exchanged", bytes=size, seconds=seconds, sent=sent, received=received)
        wire.send_eof()
        if wire.recv(1):
            raise RuntimeError("the other function sent more than was agreed on")


if __name__ == "__main__":
    main()
