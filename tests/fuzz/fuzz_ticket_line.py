"""Any line gives exactly the ticket that stands in it, or None; only an issued ticket is redeemed, and only once.

Input: the line. ``TICKET`` in it stands for the issued ticket, which no fuzzer could guess.
"""

from __future__ import annotations

import re
import socket
from typing import Any, Final

from campaign import run
from frelay.config.model import Limits
from frelay.joining.tickets import TICKET_LINE_LENGTH, TicketRegistry, parse_ticket_line
from frelay.net.slots import Admission, Slot

__all__ = ["one_input"]

_OPENING: Final = b"FRELAY/1 "


def read(line: bytes) -> str | None:
    """A second implementation, to compare with."""
    if len(line) != TICKET_LINE_LENGTH or line[:9] != _OPENING or line[-1] != 0x0A:
        return None
    ticket = line[9:-1]
    return ticket.decode() if all(octet in b"0123456789abcdef" for octet in ticket) else None


def one_input(data: bytes) -> None:
    """Check one input; raises AssertionError, or any error that should never be raised."""
    registry = TicketRegistry()
    slot = Slot(Admission(Limits(), descriptor_limit=1024))
    nobody: Any = socket.SocketType.__new__(socket.SocketType)
    with registry.issue(frozenset({"here"})) as pending:
        line = data.replace(b"TICKET", pending.ticket.encode())
        ticket = parse_ticket_line(line)
        assert ticket == read(line)
        if ticket is None:
            return
        assert re.fullmatch("[0-9a-f]{64}", ticket)
        is_right = ticket == pending.ticket
        assert not registry.redeem(ticket, "elsewhere", nobody, slot)
        assert registry.redeem(ticket, "here", nobody, slot) is is_right
        assert pending.arrived.is_set() is is_right
        assert not registry.redeem(ticket, "here", nobody, slot)
        assert len(registry) == (0 if is_right else 1)
        if is_right:
            assert pending.take() == (nobody, slot)
    assert len(registry) == 0


if __name__ == "__main__":
    run(one_input, instrument=("frelay.joining.tickets", "__main__"))
