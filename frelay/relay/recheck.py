"""The inspection: after a reload everybody who is in is judged again, by the certificates and lists in force now.

A handshake asks once, and what it found holds for as long as nothing is loaded. So this is not done by the clock: a new
CA bundle or CRL is the only thing that can make a certificate unacceptable, but for its own end, and everybody has a
deadline for that already. Who waits is refused with the code that a handshake would have given; a pairing ends with
outcome ``revoked``, unless ``policy_ends_pairings`` is off.

That deadline is a date, though, and Trio's clock knows no dates. So one task watches the two clocks side by side, and
when somebody sets the one with the date (or the machine sleeps, in which the other stands still), it has all those
deadlines reckoned again: :func:`follow_clock`.

Thousands of pairings take seconds of OpenSSL's time, in which the bytes of everybody else go on: there is a checkpoint
after each, and a certificate that many legs share is verified once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
import trio

from frelay.joining.route import LiveRoute
from frelay.protocol.messages import PartyName
from frelay.protocol.outcome import Outcome
from frelay.protocol.refusal import Refusal
from frelay.tls.context import Credential, OuterTls

__all__ = ["follow_clock", "recheck_credentials", "reload_at_expiry"]

# Seconds. notAfter counts whole ones, and a clock that NTP slews takes half an hour to get this far off.
_CLOCK_LOOK: Final = 1.0
_CLOCK_TOLERANCE: Final = 1.0
_LONGEST_SLEEP: Final = 60.0
_PARTIES: Final[tuple[PartyName, ...]] = ("func1", "func2")
# How many are woken before everybody else has a turn.
_AT_ONCE: Final = 64


async def recheck_credentials(routes: Sequence[LiveRoute], trust: OuterTls, *, ends_pairings: bool) -> None:
    """Judge all legs of ``routes`` again by ``trust``; those of pairings only if ``ends_pairings``."""
    known: dict[Credential, Refusal | None] = {}
    for route in routes:
        for waiter in [waiter for party in _PARTIES for waiter in route.lobby.waiting(party)]:
            credential = waiter.leg.credential
            if waiter.verdict is not None or credential is None:
                continue
            refusal = _judge(credential, trust, known)
            if refusal is not None:
                route.lobby.evict(waiter, refusal)
            await trio.lowlevel.checkpoint()
    if ends_pairings:
        await _judge_pairings(routes, trust, known)


def _judge(credential: Credential, trust: OuterTls, known: dict[Credential, Refusal | None]) -> Refusal | None:
    """What ``trust`` says of a certificate; dates are not asked for, since every leg has a deadline for its own."""
    if credential not in known:
        known[credential] = trust.verify(credential)
    return known[credential]


async def _judge_pairings(
    routes: Sequence[LiveRoute], trust: OuterTls, known: dict[Credential, Refusal | None]
) -> None:
    for pairing in [pairing for route in routes for pairing in route.pairings.values()]:
        # For those that began while policy_ends_pairings was off; it is nothing new to all others.
        pairing.end_with_certificates()
        for party, leg in pairing.legs.items():
            credential = leg.credential
            if credential is None:
                continue
            refusal = _judge(credential, trust, known)
            if refusal is not None:
                text = f"the certificate of {party} is no longer accepted: {refusal.reason}"
                pairing.expire_at(trio.current_time(), Outcome.REVOKED, text)
            await trio.lowlevel.checkpoint()


async def follow_clock(routes: Callable[[], Iterable[LiveRoute]]) -> None:
    """Have the ends of all certificates in ``routes`` reckoned again whenever the clock was set."""
    log = structlog.get_logger("frelay.inspection")
    reckoned_by = _ahead()
    while True:
        await trio.sleep(_CLOCK_LOOK)
        step = _ahead() - reckoned_by
        if abs(step) < _CLOCK_TOLERANCE:
            continue
        reckoned_by += step
        log.warning("the clock was set", seconds=round(step, 3))
        # As it was at this moment: who comes later reckons by the new date anyway.
        everybody: list[Callable[[], None]] = []
        for route in routes():
            everybody += (waiter.recompute_expiry for party in _PARTIES for waiter in route.lobby.waiting(party))
            everybody += (pairing.recompute_expiry for pairing in route.pairings.values())
        for number, recompute_expiry in enumerate(everybody, 1):
            recompute_expiry()
            if number % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()


async def reload_at_expiry(trust: Callable[[], OuterTls | None], request_reload: Callable[[], None]) -> None:
    """Request a reload whenever an authority in force has expired; ``trust`` gives what is in force.

    An expired one is left out of what is loaded. Until then it could stand in the way: of a newer certificate with its
    name, or of an authority that it once issued and that is trusted by itself.
    """
    told = 0.0
    while True:
        found = trust()
        end = math.inf if found is None else found.authorities_not_after
        # OpenSSL counts whole seconds.
        left = end + 1.0 - time.time()
        if left <= 0 and end != told:
            told = end
            request_reload()
        # Not all at once, for the clock may be set meanwhile.
        await trio.sleep(min(max(left, _CLOCK_LOOK), _LONGEST_SLEEP))


def _ahead() -> float:
    """How far the clock with the date is ahead of Trio's, which nobody can set."""
    return time.time() - trio.current_time()
