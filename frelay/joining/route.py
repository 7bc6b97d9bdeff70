"""A route that serves: its configuration, its lobby and its pairings.

The one decision of the relay is made here, synchronously: :meth:`LiveRoute.match` takes a leg that has just been
admitted, and pairs it with the leg that has waited longest, if there is one. Between looking at the queue and taking
the leg nothing is awaited, so no other task can take the same leg.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from frelay.config.model import Dial, Limits, Route
from frelay.config.networks import NetworkSet
from frelay.joining.charges import Charges
from frelay.joining.lobby import Lobby, Unfinished, Waiter, opposite
from frelay.joining.route_selection import Parties
from frelay.net.shares import holder_in_words
from frelay.pairing.bandwidth import Bandwidth
from frelay.pairing.forwarding import Forwarding, new_pairing_pool
from frelay.pairing.leg import Leg
from frelay.pairing.pairing import Pairing
from frelay.pairing.terms import PairingLimits, PairingTerms
from frelay.protocol.messages import PartyName
from frelay.protocol.outcome import Outcome
from frelay.protocol.refusal import Refusal
from frelay.tls.trust import OuterTls

__all__ = ["LiveRoute", "Service"]

# How many waiters that may not be paired any more one match evicts before other tasks have a turn.
_EVICTED_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True)
class Service:
    """The party of a route that the relay dials, and its address."""

    party: PartyName
    target: Dial

    @property
    def identity(self) -> str:
        """Its name for the other function and for the log."""
        return f"dial:{self.target.address}"


class LiveRoute:
    """One route of the running configuration."""

    def __init__(
        self,
        route: Route,
        limits: Limits,
        *,
        policy_ends_pairings: bool,
        forwarding: Forwarding,
        trust: Callable[[], OuterTls | None],
        instead_of: LiveRoute | None = None,
    ) -> None:
        self.config = route
        self.limits = limits
        self.lobby: Final = Lobby(limits=route.limits, clock=trio.current_time)
        self.pairings: Final[dict[str, Pairing]] = {}
        self.parties: Final = Parties(route)
        self.charges: Final = Charges(route)
        self._allowed: Final = NetworkSet(route.allow_from)
        self._proxies: Final = NetworkSet(route.proxy_protocol)
        self._pool: Final = new_pairing_pool()
        # The pairings of a route that this one replaces continue for a while, and share the budget of this one.
        self._bandwidth: Bandwidth | None = None if instead_of is None else instead_of._bandwidth
        self._set_rate(route.limits.max_bytes_per_second)
        self._pairing_terms = self._terms(policy_ends_pairings)
        self._forwarding: Final = forwarding
        self._trust: Final = trust

    @property
    def name(self) -> str:
        """The route's name."""
        return self.config.name

    def retune(self, route: Route, limits: Limits, *, policy_ends_pairings: bool) -> None:
        """Take over new limits, for legs and pairings that come from now on."""
        self.config, self.limits = route, limits
        self.lobby.limits = route.limits
        self._set_rate(route.limits.max_bytes_per_second)
        self._pairing_terms = self._terms(policy_ends_pairings)

    def _set_rate(self, rate: int | None) -> None:
        # Pairings that share the route's budget get its new rate, too. Pairings that began without a budget have pumps
        # that cannot keep to one, and stay without.
        if self._bandwidth is not None:
            self._bandwidth.rate = rate
        elif rate is not None:
            self._bandwidth = Bandwidth(rate)

    def _terms(self, policy_ends_pairings: bool) -> PairingTerms:
        """For the pairings that begin from now on."""
        route = self.config
        return PairingTerms(
            route=route.name,
            limits=_pairing_limits(route, self.limits, policy_ends_pairings),
            require_inner_tls=route.require_inner_tls,
            bandwidth=None if route.limits.max_bytes_per_second is None else self._bandwidth,
        )

    def admits_address(self, host: str) -> bool:
        """Whether a plain route's ``allow_from`` holds this source address."""
        return host in self._allowed

    def comes_by_proxy(self, host: str) -> bool:
        """Whether a connection from ``host`` must begin with a PROXY header."""
        return host in self._proxies

    def party_by_arrival(self) -> PartyName:
        """The party of a leg that arrives now on a plain route: func2 if a func1 waits, else func1."""
        return "func2" if self.lobby.count("func1") else "func1"

    @property
    def service(self) -> Service | None:
        """The party that the relay dials when the other one is here; None where both come by themselves."""
        sides: tuple[tuple[PartyName, object], ...] = (("func1", self.config.func1), ("func2", self.config.func2))
        return next((Service(party, target) for party, target in sides if isinstance(target, Dial)), None)

    @property
    def longest_wait(self) -> float:
        """How long a leg may wait here at most, in seconds.

        If the relay dials a service, no other function will come, so ``connect_timeout`` bounds it as well.
        """
        limit = self.config.limits.wait_timeout
        return limit if self.service is None else min(limit, self.service.target.connect_timeout)

    def wait_limit(self, leg: Leg) -> float:
        """How long ``leg`` may wait here, in seconds: as long as it said, and at most :attr:`longest_wait`."""
        return self.longest_wait if leg.wait is None else min(leg.wait, self.longest_wait)

    # --- matching ----------------------------------------------------------------------------------------------

    def objection(self, leg: Leg) -> Refusal | None:
        """Why ``leg`` cannot enter now, by its certificate or by the rules of the lobby; None if it can."""
        return self._policy(leg) or self.lobby.objection(leg)

    def _policy(self, leg: Leg) -> Refusal | None:
        """Check the certificate again: it may have expired since the handshake, or a reload has brought another CRL."""
        trust = self._trust()
        if leg.peer is None or trust is None:
            return None
        return trust.recheck(leg.peer)

    def match(self, leg: Leg, *, after: int = 0) -> Pairing | Refusal | Unfinished | None:
        """Pair ``leg`` with the leg that has waited longest of those that it may be paired with.

        None if no such leg waits; a refusal if ``leg`` may not be paired now. ``after`` continues an unfinished match.
        """
        for _ in range(_EVICTED_AT_ONCE):
            waiter = self.lobby.search(leg, after=after)
            if not isinstance(waiter, Waiter):
                return waiter
            after = waiter.number
            found = self.match_with(waiter, leg)
            if found is not None:
                return found
        return Unfinished(after)

    def match_with(self, waiter: Waiter, leg: Leg) -> Pairing | Refusal | None:
        """Pair ``leg`` with ``waiter``; a refusal if ``leg`` may not be paired now.

        None if ``waiter`` may not be paired any more, or its function has too many pairings: it was evicted.
        """
        if (refusal := self.lobby.closed or self.lack_of_room(leg)) is not None:
            return refusal
        if waiter.leg.is_gone():
            self.lobby.evict(waiter, Refusal("pong-timeout", "the connection has ended"))
        elif (refusal := self._policy(waiter.leg) or self.lack_of_room(waiter.leg)) is not None:
            self.lobby.evict(waiter, refusal)
        else:
            return self._pair(leg, waiter)
        return None

    def lack_of_room(self, leg: Leg) -> Refusal | None:
        """Why ``leg`` cannot be paired here now: the route or the relay has no pairing left, or none for its holder."""
        most, most_in_all = self.config.limits.max_pairings, self.limits.max_pairings_in_all
        if self._pool.is_full(most):
            text = f"the route already has {most} pairings"
        elif self._forwarding.pool.is_full(most_in_all):
            text = f"this relay already has {most_in_all} pairings"
        else:
            return self._lack_of_share(leg, most, most_in_all)
        return Refusal("limit", text, retry_after=10.0)

    def _lack_of_share(self, leg: Leg, most: int, most_in_all: int) -> Refusal | None:
        for holder in self.charges.in_route(leg):
            if not self._pool.may_take(holder, most):
                return _too_many(holder, self._pool.held(holder), f"{most} pairings of the route (max_pairings)")
        pool = self._forwarding.pool
        for holder in self.charges.in_relay(leg):
            if not pool.may_take(holder, most_in_all):
                of_all = f"{most_in_all} pairings of this relay (max_pairings_in_all)"
                return _too_many(holder, pool.held(holder), of_all)
        return None

    def _pair(self, leg: Leg, waiter: Waiter) -> Pairing:
        _settle(waiter.leg, leg)
        legs: dict[PartyName, Leg] = {leg.settled_party: leg, waiter.leg.settled_party: waiter.leg}
        waited = trio.current_time() - waiter.since
        pairing = Pairing(legs, self._pairing_terms, self._forwarding, waited=waited)
        leg.is_paired = waiter.leg.is_paired = True
        self.pairings[pairing.id] = pairing
        self._pool.take(pairing.id, self.charges.in_route(*legs.values()))
        self._forwarding.pool.take(pairing.id, self.charges.in_relay(*legs.values()))
        if leg.meet is None:
            self.lobby.note_seen(leg.settled_party)
        self.lobby.match(waiter, pairing)
        return pairing

    def unpair(self, pairing: Pairing) -> None:
        """The pairing has ended."""
        del self.pairings[pairing.id]
        self._pool.give_back(pairing.id)
        self._forwarding.pool.give_back(pairing.id)
        if pairing.meet is None:
            for party in pairing.legs:
                self.lobby.note_seen(party)

    # --- the end -----------------------------------------------------------------------------------------------

    def close(self, refusal: Refusal, *, outcome: Outcome, cut_at: float) -> None:
        """Evict the waiting legs with ``refusal``, and cut at ``cut_at`` (Trio's clock) what pairings still run."""
        self.lobby.close(refusal)
        for pairing in self.pairings.values():
            pairing.expire_at(cut_at, outcome, refusal.reason)


def _settle(waiting: Leg, leg: Leg) -> None:
    """Decide the parties of two legs that are being paired. Of two that may be either, the one that waited is func1."""
    if waiting.party == "either":
        waiting.settle("func1" if leg.party == "either" else opposite(leg.party))
    if leg.party == "either":
        leg.settle(opposite(waiting.settled_party))


def _too_many(holder: str, held: int, of_all: str) -> Refusal:
    text = f"{holder_in_words(holder)} has {held} of the {of_all}, and the rest is kept for others"
    return Refusal("limit", text, retry_after=10.0)


def _pairing_limits(route: Route, limits: Limits, policy_ends_pairings: bool) -> PairingLimits:
    return PairingLimits(
        handoff_timeout=limits.handoff_timeout,
        half_close_timeout=route.limits.half_close_timeout,
        idle_timeout=route.limits.idle_timeout,
        stall_timeout=route.limits.stall_timeout,
        max_lifetime=route.limits.max_lifetime,
        certificate_grace=route.limits.certificate_grace,
        ends_with_certificates=policy_ends_pairings,
    )
