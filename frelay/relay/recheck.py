"""The recheck: after a reload every leg is judged again, by the certificates and revocation lists now in force.

A handshake verifies a certificate once, and the result holds until something is loaded. Only a new CA bundle or CRL can
make a certificate unacceptable, apart from its own end, and every leg has a deadline for that already. So the recheck
follows reloads and not the clock. A leg that waits is refused with the code that a handshake would have given; a
pairing ends with outcome ``revoked``, unless ``policy_ends_pairings`` is off.

A certificate ends at a date, but a deadline of Trio is a time of a clock that nobody can set. The two differ after
somebody has set the system clock, or after the machine was suspended. The task :func:`follow_clock` compares the two
clocks, and has all those deadlines computed again when they have moved apart.

To verify the certificates of thousands of pairings takes seconds of OpenSSL's time. The bytes of everybody else go on
meanwhile: there is a checkpoint after each certificate, and one that many legs share is verified once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import structlog
import trio

from frelay.joining.route import LiveRoute
from frelay.joining.routes import RouteRegistry
from frelay.protocol.outcome import Outcome
from frelay.protocol.refusal import Refusal
from frelay.relay.active_config import ActiveConfig
from frelay.tls.trust import Credential, OuterTls

__all__ = ["CredentialRecheck", "follow_clock", "recheck_credentials", "reload_at_expiry"]

# Seconds. notAfter counts whole ones, and a clock that NTP slews takes half an hour to get this far off.
_CLOCK_INTERVAL: Final = 1.0
_CLOCK_TOLERANCE: Final = 1.0
_LONGEST_SLEEP: Final = 60.0
# How many legs and pairings are woken before everybody else has a turn.
_AT_ONCE: Final = 64


class CredentialRecheck:
    """Judges all legs of ``registry`` again after each :meth:`request`, by the certificates then in force."""

    def __init__(self, active: ActiveConfig, registry: RouteRegistry, log: Any) -> None:
        self._active: Final = active
        self._registry: Final = registry
        self._log: Final[Any] = log
        self._requested = trio.Event()

    def request(self) -> None:
        """Have all legs judged again; called when a configuration was put in force."""
        self._requested.set()

    @property
    def is_requested(self) -> bool:
        """Whether a recheck was requested that has not begun."""
        return self._requested.is_set()

    async def run(self) -> None:
        """Recheck on request, until cancelled."""
        while True:
            await self._requested.wait()
            self._requested = trio.Event()
            active = self._active
            if active.trust is None:
                continue
            try:
                await recheck_credentials(
                    self._registry.all,
                    active.trust,
                    ends_pairings=active.config.relay.policy_ends_pairings,
                )
            except Exception:
                # As with a reload: a bug must not end the pairings of everybody.
                self._log.exception("a bug in frelay ended the inspection after this reload")


async def recheck_credentials(routes: Sequence[LiveRoute], trust: OuterTls, *, ends_pairings: bool) -> None:
    """Judge all legs of ``routes`` again by ``trust``; those of pairings only if ``ends_pairings``."""
    known: dict[Credential, Refusal | None] = {}
    for route in routes:
        for waiter in route.lobby.everyone():
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
    """What ``trust`` says of a certificate, apart from dates: every leg has a deadline for those."""
    if credential not in known:
        known[credential] = trust.verify(credential)
    return known[credential]


async def _judge_pairings(
    routes: Sequence[LiveRoute], trust: OuterTls, known: dict[Credential, Refusal | None]
) -> None:
    for pairing in [pairing for route in routes for pairing in route.pairings.values()]:
        # Only pairings that began while policy_ends_pairings was off are changed by this.
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
    """Compute the deadlines of all certificates in ``routes`` again whenever the clock was set."""
    log = structlog.get_logger("frelay.inspection")
    ahead = _ahead()
    while True:
        await trio.sleep(_CLOCK_INTERVAL)
        step = _ahead() - ahead
        if abs(step) < _CLOCK_TOLERANCE:
            continue
        ahead += step
        log.warning("the clock was set", seconds=round(step, 3))
        # Those that are here at this moment: legs that come later go by the new date anyway.
        everybody: list[Callable[[], None]] = []
        for route in routes():
            everybody += (waiter.recompute_expiry for waiter in route.lobby.everyone())
            everybody += (pairing.recompute_expiry for pairing in route.pairings.values())
        for number, recompute_expiry in enumerate(everybody, 1):
            recompute_expiry()
            if number % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()


async def reload_at_expiry(trust: Callable[[], OuterTls | None], request_reload: Callable[[], None]) -> None:
    """Request a reload whenever an authority in force has expired; ``trust`` gives what is in force.

    Loading leaves an expired authority out. Until then it could make OpenSSL refuse certificates: those of a newer
    authority with its name, or of an authority that it once issued and that is trusted by itself.
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
        # In several sleeps, because the clock may be set meanwhile.
        await trio.sleep(min(max(left, _CLOCK_INTERVAL), _LONGEST_SLEEP))


def _ahead() -> float:
    """Seconds that the clock with the date is ahead of Trio's, which nobody can set."""
    return time.time() - trio.current_time()
