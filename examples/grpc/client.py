"""Calls all methods of server.py: ``python client.py TARGET``, where TARGET is ``unix:PATH`` or ``HOST:PORT``."""

from __future__ import annotations

import sys

import grpc

if __name__ == "__main__":
    with grpc.insecure_channel(sys.argv[1]) as channel:  # not insecure: frelay's TLS is around it
        print(channel.unary_unary("/acme.Words/Upper")(b"hello", wait_for_ready=True, timeout=60).decode())
        print(b" ".join(channel.unary_stream("/acme.Words/Count")(b"5", timeout=60)).decode())
        print(b" ".join(channel.stream_stream("/acme.Words/Echo")(iter([b"one", b"two"]), timeout=60)).decode())
