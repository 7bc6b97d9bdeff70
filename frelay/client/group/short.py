"""The short way of a small message in a group of two, on a thread that waits by blocking. Standard library only.

Theory of operation. A group of two has one wire. So while a rank waits for a message, no other wire needs a look, and
it may wait in the kernel's ``recv``. A message of one TLS record needs neither the link's queue nor its turn then, if
the link is idle. So a ping-pong costs little more than on a bare wire; by the long way it costs twice as much CPU.

All that is unusual goes the long way: another message than the expected one, the end of the wire, a fault, a full
kernel, and a message that does not come within a moment. What was read already is put back for it.
"""

from __future__ import annotations

import socket
import ssl
import struct
from typing import Any, Final, Self

from frelay.client.group.buffers import readable, writable
from frelay.client.group.collectives import Received
from frelay.client.group.frames import FORMAT, TAG, Kind, make_tag
from frelay.client.group.member import Member
from frelay.client.group.mesh import Mesh
from frelay.client.group.wires import AT_ONCE, PeerWire
from frelay.client.group.work import Transfers
from frelay.errors import Truncated

__all__ = ["ShortWay"]

_SEND: Final = make_tag(Kind.SEND)
_RECORD: Final = 16384
_LONGEST: Final = _RECORD - FORMAT.size
_READ: Final = 65536
# After so many seconds in the kernel a message comes the long way, which counts the time.
_WAIT: Final = 1.0


class ShortWay:
    """Sends and receives on the only wire of a group that is set up."""

    def __init__(self, mesh: Mesh, member: Member, wire: PeerWire) -> None:
        self._member: Final = member
        self._other: Final = 1 - mesh.rank
        self._link: Final = wire.link
        self._engine: Final = wire.engine
        self._scratch: Final = memoryview(bytearray(_READ))
        sock = wire.sock
        seconds = min(_WAIT, mesh.plan.timeout / 4)
        whole = int(seconds)
        limit = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setblocking(True)
        self._send: Final = sock.send
        self._recv_into: Final = sock.recv_into
        self.is_under_way = False
        """Whether the last call has begun to move a message: an error that interrupts it may have torn the message."""

    @classmethod
    def of(cls, mesh: Mesh, member: Member) -> Self | None:
        """The short way of a group that is set up; None if it has none. The socket's ``recv`` blocks from then on."""
        wire = mesh.only_wire()
        return None if wire is None else cls(mesh, member, wire)

    def send(self, data: Any, to: int) -> Transfers | None:
        """See :meth:`frelay.Group.send`. What it returns must be driven to its end; None: all is done."""
        self.is_under_way = False
        if type(data) is not bytes and type(data) is not bytearray:
            data = readable(data, "data")
        length = len(data)
        if to != self._other or length > _LONGEST or not self._link.is_idle:
            return self._member.send(data, to)
        engine = self._engine
        self.is_under_way = True
        try:
            engine.tls.write(b"".join((_SEND, length.to_bytes(8, "big"), data)))
            encrypted = engine.take()
        except ssl.SSLError as error:
            self._link.cut(str(error))
            return self._member.send(data, to)
        try:
            count = self._send(encrypted, AT_ONCE)
        except OSError:
            count = 0  # the kernel is full, or the connection is dead: the long way tells
        if count < len(encrypted):
            return self._member.send_rest(to, memoryview(encrypted)[count:])
        return None

    def recv(self, source: int, into: Any) -> Received | None:
        """See :meth:`frelay.Group.recv`. None: receive it the long way."""
        self.is_under_way = False
        if source != self._other or not self._link.is_idle:
            return None
        view = None if into is None else memoryview(into) if type(into) is bytearray else writable(into, "into")
        engine, scratch = self._engine, self._scratch
        self.is_under_way = True
        try:
            record = engine.read(_RECORD) if engine.has_input else None
            while record is None:
                count = self._recv_into(scratch)
                if not count:
                    return None  # the end, which the next read finds again
                engine.feed(scratch[:count])
                record = engine.read(_RECORD)
        except (Truncated, ssl.SSLError) as error:
            self._link.cut(str(error))
            return None
        except OSError:
            return None  # nothing has come in time, or the connection is dead
        length = len(record) - FORMAT.size
        if (
            not record.startswith(_SEND)
            or int.from_bytes(record[TAG.size : FORMAT.size], "big") != length
            or (view is not None and length > len(view))
        ):
            engine.put_back(record)
            return None
        if view is None:
            return bytearray(memoryview(record)[FORMAT.size :])
        view = view[:length]
        view[:] = memoryview(record)[FORMAT.size :]
        return view
