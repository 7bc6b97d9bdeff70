"""A small network of the test's own, in which cables can be cut: network namespaces, joined by veth pairs.

The relay lives in one namespace, and each place where functions are in another one::

    async with network(site, "func1", "func2") as net:          # needs root, iproute2 and nftables
        async with net.relay_there(OPEN) as relay:                # a real `frelay run`
            one, two = await join_ends(net, relay)                # each party dials from the place of its name
            net.cut("func1", to=True, back=False)                 # nothing arrives there any more, without an error
            net.mend("func1")

A :class:`Network` is a ``Site`` whose parties dial from there. Nothing leaves the namespaces, and they are gone at the
end.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Final

import pytest
import trio

from support.relay import RelayInProcess, RelayProcess
from support.site import Site
from support.tools import needs_root, tool

__all__ = ["Network", "network"]

_CLONE_NEWNET: Final = 0x40000000
_RELAY: Final = "relay"


class Network(Site):
    """A site whose relay and parties are in namespaces; places other than "func1" and "func2" act as func1."""

    def __init__(self, site: Site, places: Sequence[str]) -> None:
        super().__init__(site.directory)
        self._ip: Final = tool("ip")
        self._nft: Final = tool("nft")
        self._numbers: Final = {place: number for number, place in enumerate(places, 1)}
        for place in places:
            if place not in self.credentials:
                self.add(place, self.ca.party(dns=["func1.demo"]))

    def _namespace(self, place: str) -> str:
        return f"frelay-{os.getpid()}-{place}"

    def _run(self, *command: str, text: str | None = None) -> None:
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)

    # --- making it ---------------------------------------------------------------------------------------------

    def make(self, undo: ExitStack) -> None:
        """Make the namespaces and the cables."""
        for place in (_RELAY, *self._numbers):
            name = self._namespace(place)
            self._run(self._ip, "netns", "add", name)
            undo.callback(self._run, self._ip, "netns", "delete", name)
            self._run(self._ip, "-n", name, "link", "set", "lo", "up")
        relay = self._namespace(_RELAY)
        for place, number in self._numbers.items():
            there = self._namespace(place)
            peer = ["peer", "name", "cable", "netns", there]
            self._run(self._ip, "-n", relay, "link", "add", place, "type", "veth", *peer)
            for name, device, last in ((relay, place, 1), (there, "cable", 2)):
                self._run(self._ip, "-n", name, "address", "add", f"10.99.{number}.{last}/24", "dev", device)
                self._run(self._ip, "-n", name, "link", "set", device, "up")

    # --- cutting it --------------------------------------------------------------------------------------------

    def cut(self, place: str, *, to: bool = True, back: bool = True) -> None:
        """From now on nothing that the relay sends arrives at ``place`` (``to``), or nothing from there (``back``)."""
        if to:
            self._drop_what_arrives(place, "cable", place)
        if back:
            self._drop_what_arrives(_RELAY, place, place)

    def _drop_what_arrives(self, where: str, device: str, table: str) -> None:
        hook = "type filter hook prerouting priority -300"
        rules = f'table ip cut-{table} {{\nchain arriving {{\n{hook}\niifname "{device}" drop\n}}\n}}\n'
        self._run(self._ip, "netns", "exec", self._namespace(where), self._nft, "-f", "-", text=rules)

    def mend(self, place: str) -> None:
        """Undo a cut of both ways."""
        for where in (place, _RELAY):
            namespace = self._namespace(where)
            self._run(self._ip, "netns", "exec", namespace, self._nft, "delete", "table", "ip", f"cut-{place}")

    # --- being in it -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def relay_there(self, routes: str, *, sections: str = "") -> AsyncIterator[RelayProcess]:
        """A relay process in its namespace, on all of its addresses."""
        routes = routes.replace("127.0.0.1:0", "0.0.0.0:0")
        launcher = [self._ip, "netns", "exec", self._namespace(_RELAY)]
        async with self.process(routes, sections=sections, launcher=launcher) as relay:
            yield relay

    async def dial(self, relay: RelayInProcess | RelayProcess | int, name: str | None, route: str) -> trio.SocketStream:
        """As :meth:`Site.dial`, from the place of that name."""
        assert name is not None
        assert isinstance(relay, RelayProcess)
        with _inside(self._namespace(name)):
            # A socket belongs to the namespace where it was made, also when its thread moves.
            sock = trio.socket.socket()
        await sock.connect((f"10.99.{self._numbers[name]}.1", relay.port(route)))
        return trio.SocketStream(sock)


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """Move this thread into that namespace; do not await in here."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{namespace}") as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")
        try:
            yield
        finally:
            if libc.setns(before.fileno(), _CLONE_NEWNET):
                pytest.exit("this thread is stuck in a network namespace that is about to go", returncode=3)


@asynccontextmanager
async def network(site: Site, *places: str) -> AsyncIterator[Network]:
    """A network with a cable from the relay to each of ``places``."""
    needs_root("a network namespace")
    net = Network(site, places)
    with ExitStack() as undo:
        net.make(undo)
        yield net
