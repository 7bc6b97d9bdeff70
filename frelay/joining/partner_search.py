"""The search for a partner: what happens to a leg from the moment when a route has taken it until it is matched.

``objections`` > WAITING > match at once, or wait in the lobby > matched, refused or gone. On a route with a service the
relay dials the service while the leg waits (:mod:`frelay.joining.dial`).

All of it runs in the task of the leg's connection. A leg that is matched belongs to its pairing.
"""

from __future__ import annotations

import math
from functools import partial

import trio

from frelay.joining.accept_context import AcceptSettings, SharedParts
from frelay.joining.connection_log import ConnectionLog, refuse
from frelay.joining.dial import bring_service
from frelay.joining.lobby import Matched, Unfinished, Waiter
from frelay.joining.route import LiveRoute, Service
from frelay.journal import LegWaits
from frelay.pairing.leg import Leg, LegGone
from frelay.pairing.pairing import Pairing
from frelay.protocol.messages import Waiting
from frelay.protocol.refusal import Refusal
from frelay.tls.trust import EXPIRED

__all__ = ["PartnerSearch"]


class PartnerSearch:
    """Finds a partner for one leg of ``route``."""

    __slots__ = ("_leg", "_log", "_route", "_settings", "_shared")

    def __init__(
        self, leg: Leg, route: LiveRoute, settings: AcceptSettings, shared: SharedParts, log: ConnectionLog
    ) -> None:
        self._leg = leg
        self._route = route
        self._settings = settings
        self._shared = shared
        self._log = log

    async def run(self) -> None:
        """Returns once the leg is matched, refused or gone; unless it was matched, the caller closes it."""
        leg, route = self._leg, self._route
        objection = route.objection(leg) or self._lack_of_descriptors()
        if objection is not None:
            # The slot is not a leg's yet: a function that is refused a thousand times must not hold a thousand of the
            # legs' descriptors while it reads its refusals slowly.
            await refuse(leg, objection, self._log)
            return
        # A newer stranger may have taken this one's place just now; then it must not be admitted.
        await trio.lowlevel.checkpoint_if_cancelled()
        leg.slot.admit()
        leg.slot.charge([route.charges.waiting(leg)])
        limit = route.wait_limit(leg)
        with trio.move_on_after(self._settings.limits.join_timeout) as timeout:
            await leg.welcome(
                Waiting(
                    route=route.name,
                    party=None if leg.party == "either" else leg.party,
                    identity=leg.identity,
                    deadline=limit,
                    peer_seen=route.lobby.peer_seen(leg),
                    meet=leg.meet,
                    partner=leg.has_partner_list or None,
                )
            )
        if timeout.cancelled_caught:
            self._log.info("left", reason=f"did not read WAITING within {self._settings.limits.join_timeout:g} s")
            return
        # Other tasks ran while welcome() sent WAITING, so _match() checks everything again, and from its last check to
        # the match nothing is awaited. It also evicts a stale leg only now: two legs of one attempt that came at the
        # same moment would not have found each other before.
        found = self._match()
        while isinstance(found, Unfinished):
            await trio.lowlevel.checkpoint()
            found = self._match(found.after)
        if isinstance(found, Refusal):
            await refuse(leg, found, self._log)
        elif isinstance(found, Pairing):
            self._shared.runner.start(found, route)
        else:
            await self._wait(limit)

    def _lack_of_descriptors(self) -> Refusal | None:
        leg, route = self._leg, self._route
        if route.lobby.has_stale(leg):
            return None  # it takes the slot of the leg that it replaces
        text = self._shared.admission.objection([route.charges.waiting(leg)])
        return None if text is None else Refusal("limit", text, retry_after=10.0)

    def _match(self, after: int = 0) -> Pairing | Refusal | Unfinished | None:
        leg, route = self._leg, self._route
        objection = route.objection(leg)
        if objection is not None:
            return objection
        route.lobby.replace_stale(leg)
        return route.match(leg, after=after)

    # --- waiting in the lobby ----------------------------------------------------------------------------------

    async def _wait(self, limit: float) -> None:
        leg, route = self._leg, self._route
        end: LegGone | Refusal | None = None
        self._log.info("waiting", seconds=limit, mode=leg.mode)
        self._shared.journal.note(
            LegWaits(
                route=route.name,
                party=leg.party,
                identity=leg.identity,
                address=leg.address,
                mode=leg.mode,
                meet=leg.meet,
            )
        )
        # Dialling a service ends at the same limit by itself, and then says why it failed.
        wait_ends = math.inf if route.service else trio.current_time() + limit
        with trio.CancelScope() as scope:

            def recompute_expiry() -> None:
                scope.deadline = min(wait_ends, leg.expires_at())

            recompute_expiry()
            waiter = route.lobby.enter(
                leg,
                lambda: scope.cancel(reason="the lobby has decided about this leg"),
                recompute_expiry=recompute_expiry,
            )
            try:
                end = await self._attend(waiter, limit)
            finally:
                route.lobby.leave(waiter)
                if isinstance(waiter.verdict, Matched):
                    waiter.verdict.pairing.release()
        if isinstance(waiter.verdict, Matched):
            return
        if isinstance(waiter.verdict, Refusal):
            await refuse(leg, waiter.verdict, self._log)
        elif end is None and scope.deadline < wait_ends:
            await refuse(leg, EXPIRED, self._log)
        elif end is None:
            await refuse(leg, self._nobody_came(limit), self._log)
        elif isinstance(end, Refusal):
            await refuse(leg, end, self._log)
        elif route.service is not None:
            # Counted as a refusal: otherwise nobody would see a service that never answers, if all callers give up.
            self._log.note_refusal(Refusal("wait-timeout", f"{end.detail}, before the service answered"))
        else:
            self._log.info("left", reason=end.detail)

    def _nobody_came(self, limit: float) -> Refusal:
        # A function that waits 5 s says 4.98 in its JOIN, when it has reached the relay.
        after = f"within {round(limit, 1) or limit:g} s"
        if self._leg.meet is None:
            return Refusal("wait-timeout", f"nobody came {after}", retry_after=0.0)
        # Two legs of one key that accept each other never both wait. So a list excluded all that wait.
        excluded = self._route.lobby.candidate_count(self._leg)
        if not excluded:
            # Others may have come, with other keys: only "with this key" makes a person compare the keys.
            return Refusal("wait-timeout", f"nobody came with this key {after}", retry_after=0.0)
        legs = "1 leg with this key was" if excluded == 1 else f"{excluded} legs with this key were"
        return Refusal("wait-timeout", f"nobody came {after}; {legs} excluded by a partner list", retry_after=0.0)

    async def _attend(self, waiter: Waiter, limit: float) -> LegGone | Refusal:
        """Keep the leg alive while it waits, and dial the service of its route, if there is one."""
        limits, service = self._settings.limits, self._route.service
        attend = partial(waiter.leg.attend, ping_interval=limits.ping_interval, pong_timeout=limits.pong_timeout)
        if service is None:
            return await attend()
        async with trio.open_nursery() as beside:
            beside.start_soon(self._dial, service, waiter, limit)
            end = await attend()
            beside.cancel_scope.cancel(reason="the caller has gone")
        return end

    async def _dial(self, service: Service, waiter: Waiter, limit: float) -> None:
        shared = self._shared
        pairing = await bring_service(
            waiter,
            self._route,
            service,
            limit=limit,
            tcp=self._settings.tcp,
            admission=shared.admission,
            journal=shared.journal,
        )
        if pairing is not None:
            shared.runner.start(pairing, self._route)
