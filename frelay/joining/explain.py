"""Why a certificate is let in or not: the relay's own checks, one after the other, without a relay.

Nothing is decided here. :func:`examine` asks the same code that decides when a function dials: the TLS context, by a
simulated handshake, ``OuterTls.recheck`` and ``select_route``. This module adds the order of the checks, a remedy for
each (:mod:`frelay.joining.remedies`), and hints about near misses (:mod:`frelay.joining.near_misses`).

OpenSSL stops at the first thing that is wrong. So the check that refuses is exact, those before it have passed, and
those after it were not reached. One exception, because a person wants to know it: which routes the names would fit once
the rest is corrected.

``as_json`` of a :class:`Verdict` is a stable shape; keys may be added to it, none goes or changes its meaning:

* ``admitted``: whether anything lets it in (to the route asked for, if one was);
* ``certificate``: see :mod:`frelay.tls.facts`;
* ``checks``: in order, each with ``name``, ``result`` ("ok", "refuses" or "not reached"), ``text``, and ``remedy`` or
  null;
* ``routes``: what the names fit, each with ``route``, ``party``, ``identity`` and ``note`` (how to ask for it) or null;
  ``routes_checked``: among how many; ``plain_routes``: those that look at no certificate;
* ``refusal``: null, or ``code`` (REFUSED's, and the log's), ``reason`` (as the log has it), and what the function sees:
  ``alert`` (of TLS, or null) or ``told`` (the sentence of the REFUSED frame, or null);
* ``hints``: sentences;
* ``warnings``: sentences on what the relay lets in and the other function would refuse: see :func:`_inner_warnings`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from frelay.config.model import Config, Dial, Route
from frelay.config.plan import ListenerKey, listener_keys
from frelay.joining.near_misses import PARTIES, near_misses, side_of
from frelay.joining.remedies import certificate_at, remedy_for
from frelay.joining.route_selection import (
    NotAdmitted,
    Parties,
    PartyMatch,
    PartyTable,
    not_authorised,
    select_route,
)
from frelay.protocol.identity import Name
from frelay.protocol.messages import Join, PartyName
from frelay.protocol.refusal import Refusal
from frelay.tls.dry_run import HandshakeResult, simulate_handshake
from frelay.tls.facts import CertificateFacts, certificate_facts, iso
from frelay.tls.identity import MOST_NAMES, identities
from frelay.tls.trust import FailedVerification, OuterTls

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["Check", "RouteFit", "SeenRefusal", "Verdict", "examine"]

Result = Literal["ok", "refuses", "not reached"]

_REVOKED: Final = 23
# What OpenSSL checks, in its order (verify_chain in its crypto/x509/x509_vfy.c), and the X509_V_ERR of each. A client
# that cannot sign with its key in TLS 1.3 shows no certificate at all, so the key comes first.
_STAGES: Final[tuple[tuple[str, frozenset[int]], ...]] = (
    ("key", frozenset({66})),
    ("issuer", frozenset({2, 18, 19, 20, 21, 22, 24, 29, 30, 31, 55})),
    ("purpose", frozenset({25, 26, 27, 28, 32, 34, 37, 39, 41, 79})),
    ("strength", frozenset({67, 68, 94})),
    ("revocation", frozenset({3, 5, 8, 11, 12, 15, 16, 23, 33, 35, 36, 44, 54})),
    ("signature and dates", frozenset({4, 6, 7, 9, 10, 13, 14, 76, 77, 78})),
    ("name constraints", frozenset({47, 48, 49, 51, 52, 53})),
)
_OF_LISTS: Final = dict(_STAGES)["revocation"] - {_REVOKED}
_HINTS: Final = 8


@dataclass(frozen=True, slots=True)
class Check:
    """One check; ``text`` is what was found, ``remedy`` what to do where it refuses."""

    name: str
    result: Result
    text: str = ""
    remedy: str | None = None

    def as_json(self) -> dict[str, Any]:
        """See the module."""
        return {"name": self.name, "result": self.result, "text": self.text, "remedy": self.remedy}


@dataclass(frozen=True, slots=True)
class SeenRefusal:
    """A refusal as the log has it, and ``alert`` or ``told`` as the function sees it."""

    code: str
    reason: str
    alert: str | None = None
    told: str | None = None

    @classmethod
    def by_frame(cls, refusal: Refusal) -> SeenRefusal:
        """One that the function is told by REFUSED."""
        return cls(refusal.code, refusal.logged, told=refusal.reason)

    def as_json(self) -> dict[str, Any]:
        """See the module."""
        return {"code": self.code, "reason": self.reason, "alert": self.alert, "told": self.told}


@dataclass(frozen=True, slots=True)
class RouteFit:
    """A route that the names fit, with the parties that the function may play there."""

    route: str
    parties: tuple[PartyMatch, ...]
    note: str | None

    def as_json(self) -> list[dict[str, Any]]:
        """One object for each party; see the module."""
        return [
            {"route": self.route, "party": match.party, "identity": str(match.name), "note": self.note}
            for match in self.parties
        ]


@dataclass(frozen=True, slots=True)
class Verdict:
    """All that there is to say; ``refusal`` is None for a certificate that is let in."""

    facts: CertificateFacts
    checks: tuple[Check, ...]
    fits: tuple[RouteFit, ...]
    routes_checked: int
    plain_routes: tuple[str, ...]
    refusal: SeenRefusal | None
    hints: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def objection(self) -> Check | None:
        """The check that refuses."""
        return next((check for check in self.checks if check.result == "refuses"), None)

    def as_json(self, now: datetime) -> dict[str, Any]:
        """See the module."""
        return {
            "admitted": self.refusal is None,
            "certificate": self.facts.as_json(now),
            "checks": [check.as_json() for check in self.checks],
            "routes": [entry for fit in self.fits for entry in fit.as_json()],
            "routes_checked": self.routes_checked,
            "plain_routes": list(self.plain_routes),
            "refusal": None if self.refusal is None else self.refusal.as_json(),
            "hints": list(self.hints),
            "warnings": list(self.warnings),
        }


def examine(
    config: Config, trust: OuterTls | None, chain: Sequence[x509.Certificate], route: str | None = None
) -> Verdict:
    """Judge ``chain``, the certificate itself first, as a relay with ``config`` would now.

    ``trust`` is what :func:`frelay.relay.prepare.prepare` made of ``config``. With ``route``, which must be one of the
    configuration's, only that route counts.
    """
    facts = certificate_facts(chain[0])
    asked = [one for one in config.routes if route is None or one.name == route]
    plain = tuple(one.name for one in asked if one.outer == "none")
    guarded = [one for one in asked if one.outer != "none"]
    if trust is None or not guarded:
        # No route asks for a certificate, so none is refused.
        return Verdict(facts, (), (), 0, plain, None, ())
    identity = identities(chain[0])
    names = identity.names
    shared = Counter(key for one in config.routes for key in listener_keys(one))
    found = tuple(
        RouteFit(one.name, tuple(parties), _how_to_ask(one, parties, shared))
        for one in guarded
        if (parties := Parties(one).matches(names))
    )
    handshake = simulate_handshake(trust, chain)
    checks, refusal = _verify(handshake, trust, facts, config)
    named, chosen = _names(facts), _route(guarded, found, names, config)
    if refusal is None and identity.objection is not None:
        remedy = f"issue certificates with at most {MOST_NAMES} names: one for each function, say"
        checks += [Check("names", "refuses", identity.objection, remedy), Check("route", "not reached")]
        refusal = SeenRefusal.by_frame(not_authorised(identity.objection).refusal)
    elif refusal is None:
        checks += [named, chosen[0]]
        refusal = chosen[1]
    else:
        checks += [Check("names", "not reached"), Check("route", "not reached")]
    hints = [] if found or identity.objection else list(near_misses(facts, guarded))
    if facts.authority and not all(certificate_facts(one).authority for one in chain[1:]):
        hints.insert(0, "the file begins with the certificate of an authority; the function's own must be the first")
    if handshake.failure is not None and handshake.failure.number in _OF_LISTS:
        hints += [warning.message for warning in trust.warnings if warning.key == "tls.crl"]
    warnings = tuple(_inner_warnings(chain, found))
    return Verdict(facts, tuple(checks), found, len(guarded), plain, refusal, tuple(hints[:_HINTS]), warnings)


# --- what the other function will say -----------------------------------------------------------------------------


def _inner_warnings(chain: Sequence[x509.Certificate], found: Sequence[RouteFit]) -> Iterator[str]:
    """Why a function that the relay lets in may fail in the inner TLS, where func2 is the server.

    func1 needs clientAuth there, which the relay has already checked.
    """
    servers = [one.route for one in found if any(match.party == "func2" for match in one.parties)]
    if not servers:
        return
    where = f"func2 of route {servers[0]}" + (f" and {len(servers) - 1} more" if len(servers) > 1 else "")
    for depth, one in enumerate(chain):
        facts = certificate_facts(one)
        if facts.usages is None or "serverAuth" in facts.usages:
            continue
        whose = "the certificate" if depth == 0 else f"its authority {facts.subject}"
        yield (
            f"as {where} it is the server of the TLS between the functions, and {whose} is not for servers (its "
            "extended key usage lacks serverAuth): func1 will refuse it; issue it with serverAuth and clientAuth, as "
            "`frelay ca party` does"
        )


# --- what TLS says ------------------------------------------------------------------------------------------------


def _verify(
    handshake: HandshakeResult, trust: OuterTls, facts: CertificateFacts, config: Config
) -> tuple[list[Check], SeenRefusal | None]:
    """The checks of OpenSSL and of ``OuterTls.recheck``, and how the relay says no if one of them refuses."""
    failure = handshake.failure
    if failure is None:
        checks = [Check(name, "ok", _passed(name, handshake, trust, facts)) for name, _ in _STAGES]
        if handshake.peer is None or (late := trust.recheck(handshake.peer)) is None:
            return checks, None
        # It expired within the last milliseconds: its handshake would succeed, and the relay would refuse its leg.
        stage, remedy = ("signature and dates", "issue a new one")
        if late.code != "certificate-expired":
            stage, remedy = ("revocation", "publish a list that is in date")
        checks = [Check(stage, "refuses", late.reason, remedy) if one.name == stage else one for one in checks]
        return checks, SeenRefusal.by_frame(late)
    refusal = SeenRefusal(failure.refusal.code, failure.refusal.reason, alert=handshake.alert)
    refusing = next((name for name, errors in _STAGES if failure.number in errors), None)
    if handshake.unshown is not None:
        refusing = "key"
    if refusing is None:
        # An error of no stage that we know: how many checks OpenSSL passed before it is not known.
        checks = [Check(name, "not reached") for name, _ in _STAGES]
        return [*checks, Check("verification", "refuses", refusal.reason, "see OpenSSL's manual")], refusal
    checks = []
    result: Result = "ok"
    for name, _ in _STAGES:
        if name == refusing:
            checks.append(
                Check(
                    name,
                    "refuses",
                    _what_is_wrong(handshake, failure, facts),
                    remedy_for(failure, handshake, trust, facts, config),
                )
            )
            result = "not reached"
        else:
            checks.append(Check(name, result, _passed(name, handshake, trust, facts) if result == "ok" else ""))
    return checks, refusal


def _passed(name: str, handshake: HandshakeResult, trust: OuterTls, facts: CertificateFacts) -> str:
    match name:
        case "key":
            return facts.key
        case "issuer":
            return " < ".join(handshake.path[1:])
        case "purpose":
            return "any, since it names none" if facts.usages is None else ", ".join(facts.usages)
        case "revocation" if trust.crl_next_update is None:
            return "no tls.crl, so nobody is ever revoked"
        case "revocation":
            until = datetime.fromtimestamp(trust.crl_next_update or 0, UTC)
            return f"not on the list, which is good until {iso(until)}"
        case "signature and dates":
            end = facts.not_after.timestamp() if handshake.peer is None else handshake.peer.credential.not_after
            return f"until {iso(datetime.fromtimestamp(end, UTC))}"
    return ""


def _what_is_wrong(handshake: HandshakeResult, failure: FailedVerification, facts: CertificateFacts) -> str:
    if handshake.unshown is not None:
        return f"{facts.key}; no function can show this certificate: {handshake.unshown}"
    reason = failure.refusal.reason
    return reason if failure.depth == 0 else f"{reason}: {certificate_at(failure.depth, handshake)}"


# --- what its names say -------------------------------------------------------------------------------------------


def _names(facts: CertificateFacts) -> Check:
    ignored = f" ({len(facts.ignored)} ignored)" if facts.ignored else ""
    return Check("names", "ok", f"{', '.join(facts.names) or 'none'}{ignored}")


def _route(
    asked: Sequence[Route], found: Sequence[RouteFit], names: tuple[Name, ...], config: Config
) -> tuple[Check, SeenRefusal | None]:
    """Whether one of the routes asked for lets these names in, and if none does, how the relay refuses."""
    if found:
        shown = ", ".join(
            f"{one.route} as {' or '.join(match.party for match in one.parties)}" for one in found[:_HINTS]
        )
        more = f" and {len(found) - _HINTS} more" if len(found) > _HINTS else ""
        return Check("route", "ok", shown + more), None
    only = asked[0] if len(asked) == 1 else None
    neighbours = asked if only is None else _neighbours(only, config)
    join = None if only is None else Join(attempt="", route=only.name)
    try:
        select_route(PartyTable({one.name: Parties(one) for one in neighbours}), names, join, "")
    except NotAdmitted as error:
        text = f"fits none of {len(asked)} routes" if only is None else f"fits neither party of route {only.name}"
        if only is not None:
            text += "".join(f"; {party} is {_wanted(only, party)}" for party in PARTIES)
        remedy = (
            "issue a certificate with a name that the route wants, or add one of this certificate's names to the "
            f"route{'' if only is None else f' in {only.source}'}"
        )
        refusal = SeenRefusal.by_frame(error.refusal)
        return Check("route", "refuses", text, remedy), refusal
    raise AssertionError("a route was selected for a certificate that fits none")


def _wanted(route: Route, party: PartyName) -> str:
    side = side_of(route, party)
    if isinstance(side, Dial):
        return f"no function ({side})"
    selectors = [str(one) for one in side]
    more = f" or {len(selectors) - _HINTS} more" if len(selectors) > _HINTS else ""
    return " or ".join(selectors[:_HINTS]) + more


def _neighbours(route: Route, config: Config) -> list[Route]:
    """The routes that share an address with ``route``, itself included."""
    keys = set(listener_keys(route))
    return [one for one in config.routes if not keys.isdisjoint(listener_keys(one))]


def _how_to_ask(route: Route, parties: Sequence[PartyMatch], shared: Mapping[ListenerKey, int]) -> str | None:
    """What a function must say in addition to showing its certificate; None if the certificate is enough."""
    says = []
    key = max(listener_keys(route), key=lambda one: shared[one])
    if shared[key] > 1:
        says.append(
            f"{shared[key]} routes share {key.address}: ask for this one, by JOIN.route or SNI {route.name}.NAME"
        )
    if len(parties) > 1:
        says.append("it fits both parties: say which, by JOIN.party, or join with a key, by JOIN.meet")
    return "; ".join(says) or None
