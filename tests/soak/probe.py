"""How late is a relay's event loop? ``python tests/soak/probe.py PORT``, with a plain route at that port.

It sends one byte at a time through a pairing, from one of its sockets to another. Only the relay's loop and the machine
can delay it. Each second it prints a line of JSON: the median and the longest delay, in milliseconds. It is a process
of its own, so that it does not measure the event loop of the load generator.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from statistics import median
from typing import Final

_PAUSE: Final = 0.02
_TIMEOUT: Final = 60.0
# On a plain route the relay insists that the first bytes look like TLS.
_TLS_HEADER: Final = b"\x16\x03\x01"


def main() -> None:
    """Probe until the connection ends."""
    one, two = (socket.create_connection(("127.0.0.1", int(sys.argv[1])), _TIMEOUT) for _ in range(2))
    with one, two:
        for sock in (one, two):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.sendall(_TLS_HEADER)
        two.recv(len(_TLS_HEADER), socket.MSG_WAITALL)
        while True:
            ways = []
            until = time.monotonic() + 1
            while time.monotonic() < until:
                began = time.perf_counter()
                one.sendall(b".")
                if not two.recv(1):
                    return
                ways.append((time.perf_counter() - began) * 1e3)
                time.sleep(_PAUSE)
            print(json.dumps({"median": median(ways), "longest": max(ways)}), flush=True)


if __name__ == "__main__":
    main()
