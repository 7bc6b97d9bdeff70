"""The arguments of ``group``: their checks, and the plan that they make. Standard library only."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypedDict

from frelay.client.contexts import StrPath
from frelay.client.options import JoinPlan
from frelay.client.peer import read_selectors
from frelay.client.retry import Retry
from frelay.protocol.messages import Mode, read_key

__all__ = ["ConnectOptions", "GroupPlan", "Peer"]

Peer = str | Sequence[str] | Callable[[int], str | Sequence[str]]

# The first pauses are short, because a partner that was cut is back at once; the relay adds its retry_after.
_RETRY: Final = Retry(tries=None, first=0.1, longest=2.0)
_LARGEST: Final = 4096


class RequiredConnectOptions(TypedDict):
    """The arguments that every ``connect`` needs."""

    cert: StrPath
    ca: StrPath


class ConnectOptions(RequiredConnectOptions, total=False):
    """The arguments of ``connect`` that ``group`` takes, too; the others it sets by itself."""

    key: StrPath | None
    route: str | None
    server_name: str | None
    inner_cert: StrPath | None
    inner_key: StrPath | None
    inner_ca: StrPath | None
    mode: Mode
    proxy: str | None
    traceparent: str | None


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """All that is known before the first join: the arguments are checked and the files are read."""

    name: str
    rank: int
    size: int
    timeout: float
    eager: bool | None
    at_once: int
    peer: Peer
    base: JoinPlan
    """The plan of one join, without what differs by rank. All joins share its TLS contexts."""

    @classmethod
    def make(
        cls,
        address: str,
        *,
        name: str,
        rank: int,
        size: int,
        peer: Peer,
        timeout: float,
        eager: bool | None,
        at_once: int,
        options: ConnectOptions,
    ) -> GroupPlan:
        """The plan for these arguments. Raises TypeError, ValueError, CertificateError or RelayUnreachable."""
        for option in options:
            if option not in ConnectOptions.__annotations__:
                raise TypeError(f"group() got an unexpected keyword argument {option!r}")
        if not 1 <= size <= _LARGEST:
            raise ValueError(f"size={size}: a group has 1 to {_LARGEST} ranks")
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank}: the ranks of a group of {size} are 0 to {size - 1}")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: write how many seconds a group may be without progress")
        if at_once < 1:
            raise ValueError(f"at_once={at_once}: at least one join must be under way")
        try:
            read_key(_key(name, max(size - 2, 0), size - 1))
        except ValueError:
            raise ValueError(
                f"name={name!r}: with the ranks behind it the name makes a key: visible ASCII without spaces, "
                f"at most {128 - len(_key('', max(size - 2, 0), size - 1))} characters for this size"
            ) from None
        base = JoinPlan.make(address, **_connect_options(options, _first_peer(peer, rank, size)))
        plan = cls(name, rank, size, timeout, eager, at_once, peer, base)
        for other in {*range(size)} - {rank}:
            plan.join_plan(other)  # raises now what would else end the set-up in its middle
        # In a group of two the one name may well be the other rank's own.
        if size > 2 and isinstance(peer, str) and "{rank}" not in peer:
            warnings.warn(
                f"peer={peer!r} is the same name for all ranks, so a function with such a certificate can be any rank; "
                "give each rank a certificate of its own, and write {rank} into its name here",
                stacklevel=3,
            )
        return plan

    @property
    def name_digest(self) -> bytes:
        """SHA-256 of the group's name."""
        return hashlib.sha256(self.name.encode()).digest()

    def join_plan(self, other: int) -> JoinPlan:
        """The plan of the join with rank ``other``. Raises ValueError for a ``peer`` that cannot be read."""
        selectors = read_selectors(_peer_of(self.peer, other, self.size))
        return replace(
            self.base,
            expected=selectors,
            partner=tuple(str(selector) for selector in selectors),
            meet=_key(self.name, min(self.rank, other), max(self.rank, other)),
            party="func1" if self.rank < other else "func2",
            retry=_RETRY,
        )


def _connect_options(options: ConnectOptions, peer: str | Sequence[str]) -> Any:
    return {**options, "peer": peer}


def _key(name: str, low: int, high: int) -> str:
    return f"{name}/{low}-{high}"


def _first_peer(peer: Peer, rank: int, size: int) -> str | Sequence[str]:
    """The peer of some other rank, to check the arguments with; of this rank itself if it is alone."""
    return _peer_of(peer, 1 if rank == 0 and size > 1 else 0, size)


def _peer_of(peer: Peer, rank: int, size: int) -> str | Sequence[str]:
    if isinstance(peer, str):
        return peer.replace("{rank}", str(rank))
    if callable(peer):
        return peer(rank)
    if len(peer) != size:
        raise ValueError(f"peer: there are {len(peer)} names for {size} ranks; give one for each rank")
    return peer[rank]
