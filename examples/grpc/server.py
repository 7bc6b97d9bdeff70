"""A gRPC server at a Unix socket: ``python server.py PATH``. The service has one method of each kind, over bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc


def upper(request: bytes, context: grpc.ServicerContext) -> bytes:
    """One request, one answer."""
    return request.upper()


def count(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    """One request, many answers."""
    return (str(number).encode() for number in range(int(request)))


def echo(requests: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """Many requests, many answers."""
    yield from requests


METHODS = {
    "Upper": grpc.unary_unary_rpc_method_handler(upper),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Echo": grpc.stream_stream_rpc_method_handler(echo),
}

if __name__ == "__main__":
    server = grpc.server(ThreadPoolExecutor(max_workers=8))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("acme.Words", METHODS)])
    server.add_insecure_port(f"unix:{sys.argv[1]}")  # not insecure: frelay's TLS is around it
    server.start()
    server.wait_for_termination()
