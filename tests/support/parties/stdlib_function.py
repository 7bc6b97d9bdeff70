"""A function written from docs/protocol.md alone: Python's ``ssl``, ``SSLSocket.unwrap()``, and nothing of frelay.

Usage: ``python -I -S stdlib_function.py SETTINGS``, where SETTINGS is a JSON object with host, port, cert, key, ca,
size and seed. It joins, waits, does the hand-off, runs the inner mTLS in the role that PAIRED gave it, sends ``size``
bytes and receives as many, and ends. What it found goes to stdout as one JSON object.

The hand-off is section 4, word for word: ``recv()`` until ``b""``, then ``unwrap()``.
"""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import struct
import sys
import uuid
from typing import Any

JOIN, PONG, WAITING, PING, PAIRED, REFUSED = 0x01, 0x02, 0x11, 0x12, 0x13, 0x14
CHUNK = 256 * 1024


def frame(kind: int, payload: dict[str, Any]) -> bytes:
    body = json.dumps(payload).encode("utf-8")
    return struct.pack(">BBH", kind, 0, len(body)) + body


def read_exactly(sock: ssl.SSLSocket, count: int) -> bytes:
    parts = []
    while count:
        data = sock.recv(count)
        if not data:
            raise SystemExit(f"the end came with {count} bytes missing")
        parts.append(data)
        count -= len(data)
    return b"".join(parts)


def read_frame(tls: ssl.SSLSocket) -> tuple[int, dict[str, Any]]:
    kind, zero, length = struct.unpack(">BBH", read_exactly(tls, 4))
    assert zero == 0
    return kind, json.loads(read_exactly(tls, length))


def dial(settings: dict[str, Any]) -> ssl.SSLSocket:
    """Section 1: TLS 1.3, our certificate, ALPN frelay/1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(settings["ca"])
    context.load_cert_chain(settings["cert"], settings["key"])
    context.set_alpn_protocols(["frelay/1"])
    sock = socket.create_connection((settings["host"], settings["port"]), timeout=30)
    # Without suppress_ragged_eofs a missing close_notify is an error, as section 4 wants it to be.
    tls = context.wrap_socket(sock, server_hostname=settings["host"], suppress_ragged_eofs=False)
    assert tls.selected_alpn_protocol() == "frelay/1"
    return tls


def join(tls: ssl.SSLSocket, story: dict[str, Any]) -> str:
    """Section 3: JOIN, then WAITING, PINGs, and PAIRED."""
    tls.sendall(frame(JOIN, {"attempt": str(uuid.uuid4()), "wait": 30, "modes": ["handoff"]}))
    while True:
        kind, payload = read_frame(tls)
        if kind == PING:
            tls.sendall(frame(PONG, {"n": payload["n"]}))
        elif kind == WAITING:
            story["waiting"] = payload
        elif kind == PAIRED:
            story["paired"] = payload
            return str(payload["role"])
        elif kind == REFUSED:
            raise SystemExit(f"refused: {payload}")
        elif kind < 0x80:
            raise SystemExit(f"a frame of type {kind:#x} is not for a party")


def hand_off(tls: ssl.SSLSocket) -> socket.socket:
    """Section 4.2."""
    while data := tls.recv(16384):
        raise SystemExit(f"data after PAIRED: {data!r}")
    return tls.unwrap()


def meet(raw: socket.socket, role: str, settings: dict[str, Any], story: dict[str, Any]) -> ssl.SSLSocket:
    """Section 10: mTLS with the other function; each looks at the other's certificate for itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if role == "client" else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if role == "server":
        context.num_tickets = 0
    context.load_verify_locations(settings["ca"])
    context.load_cert_chain(settings["cert"], settings["key"])
    wire = context.wrap_socket(raw, server_side=role == "server", suppress_ragged_eofs=False)
    certificate: dict[str, Any] = wire.getpeercert() or {}
    story["peer"] = certificate["subjectAltName"]
    return wire


def send(wire: ssl.SSLSocket, settings: dict[str, Any], story: dict[str, Any]) -> None:
    sha = hashlib.sha256()
    block = hashlib.sha256(settings["seed"].encode()).digest() * (CHUNK // 32)
    left = settings["size"]
    while left:
        chunk = block[: min(left, CHUNK)]
        wire.sendall(chunk)
        sha.update(chunk)
        left -= len(chunk)
    story["sent"] = sha.hexdigest()


def receive(wire: ssl.SSLSocket, settings: dict[str, Any], story: dict[str, Any]) -> None:
    sha = hashlib.sha256()
    left = settings["size"]
    while left:
        data = wire.recv(min(left, CHUNK))
        if not data:
            raise SystemExit(f"the end came with {left} bytes missing")
        sha.update(data)
        left -= len(data)
    story["received"] = sha.hexdigest()


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    story: dict[str, Any] = {}
    tls = dial(settings)
    role = join(tls, story)
    raw = hand_off(tls)
    wire = meet(raw, role, settings, story)
    # An SSLSocket is for one direction at a time, so they take turns.
    for step in (send, receive) if role == "client" else (receive, send):
        step(wire, settings, story)
    # Both ends in order: close_notify each way, then FIN.
    wire.unwrap().close()
    story["foreign"] = sorted(
        {"frelay", "trio", "OpenSSL", "cryptography"} & {name.partition(".")[0] for name in sys.modules}
    )
    story["site"] = "site" in sys.modules
    print(json.dumps(story))


main()
