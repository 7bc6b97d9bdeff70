"""Why a certificate is let in or not: the relay's own checks, one after the other, without a relay.

Nothing is decided here. :func:`examine` puts the questions to those who decide when a function dials: the TLS context
by a rehearsed handshake, ``OuterTls.judge``, and ``choice``. What this module adds is the order of the checks, a
remedy for each, and hints where a name comes near.

OpenSSL stops at the first thing that is wrong. So the check that refuses is exact, those before it have passed, and
those after it were not reached. One thing is said of them all the same, since it is what a person wants to know: which
routes the names would fit once the rest is mended.

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
* ``warnings``: sentences on what the relay lets in, and the other function would refuse: see :func:`_inner_warnings`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, Final, Literal

from frelay.config.model import Config, Dial, Party, Route
from frelay.config.plan import ListenerKey, listener_keys
from frelay.joining.route_selection import Fit, NotAdmitted, Parties, Table, choose, not_authorised
from frelay.protocol.identity import Kind, Name, OddName, Selector, dns_name
from frelay.protocol.messages import Join, PartyName
from frelay.protocol.refusal import Refusal
from frelay.tls.context import FailedVerification, OuterTls
from frelay.tls.dry_run import Rehearsal, rehearse
from frelay.tls.facts import CertificateFacts, Claim, certificate_facts, iso
from frelay.tls.identity import MOST_NAMES, identities

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
_PARTIES: Final[tuple[PartyName, ...]] = ("func1", "func2")
_HINTS: Final = 8
# Two letters changed places in a name of ten: 0.9. Names of one domain that have no more than that in common: 0.7.
_ALIKE: Final = 0.85
_SHOWN: Final = 128
_DIGITS: Final = re.compile(r"[0-9]+")
_WORDS: Final = {Kind.DNS: "DNS name", Kind.URI: "URI"}


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
    """A route that the names fit, with the parties that they may play there."""

    route: str
    parties: tuple[Fit, ...]
    note: str | None

    def as_json(self) -> list[dict[str, Any]]:
        """One object for each party; see the module."""
        return [
            {"route": self.route, "party": fit.party, "identity": str(fit.name), "note": self.note}
            for fit in self.parties
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
        # Nobody asks for a certificate, so none is refused.
        return Verdict(facts, (), (), 0, plain, None, ())
    identity = identities(chain[0])
    names = identity.names
    shared = Counter(key for one in config.routes for key in listener_keys(one))
    found = tuple(
        RouteFit(one.name, tuple(parties), _how_to_ask(one, parties, shared))
        for one in guarded
        if (parties := Parties(one).fits(names))
    )
    rehearsal = rehearse(trust, chain)
    checks, refusal = _verify(rehearsal, trust, facts, config)
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
    hints = [] if found or identity.objection else list(_hints(facts, guarded))
    if facts.authority and not all(certificate_facts(one).authority for one in chain[1:]):
        hints.insert(0, "the file begins with the certificate of an authority; the function's own must be the first")
    if rehearsal.failure is not None and rehearsal.failure.number in _OF_LISTS:
        hints += [warning.message for warning in trust.warnings if warning.key == "tls.crl"]
    warnings = tuple(_inner_warnings(chain, found))
    return Verdict(facts, tuple(checks), found, len(guarded), plain, refusal, tuple(hints[:_HINTS]), warnings)


# --- what the other function will say -----------------------------------------------------------------------------


def _inner_warnings(chain: Sequence[x509.Certificate], found: Sequence[RouteFit]) -> Iterator[str]:
    """Why a function that is let in fails all the same: in the inner TLS func2 is the server, and shows what it has.

    What func1 needs there, clientAuth, the relay has asked for already.
    """
    servers = [one.route for one in found if any(fit.party == "func2" for fit in one.parties)]
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
    rehearsal: Rehearsal, trust: OuterTls, facts: CertificateFacts, config: Config
) -> tuple[list[Check], SeenRefusal | None]:
    """The checks of OpenSSL and of ``OuterTls.judge``, and how the relay says no if one of them refuses."""
    failure = rehearsal.failure
    if failure is None:
        checks = [Check(name, "ok", _passed(name, rehearsal, trust, facts)) for name, _ in _STAGES]
        if rehearsal.peer is None or (late := trust.judge(rehearsal.peer)) is None:
            return checks, None
        # Its time ran out within the last milliseconds: a handshake would have been let in, and the leg refused.
        stage, remedy = ("signature and dates", "issue a new one")
        if late.code != "certificate-expired":
            stage, remedy = ("revocation", "publish a list that is in date")
        checks = [Check(stage, "refuses", late.reason, remedy) if one.name == stage else one for one in checks]
        return checks, SeenRefusal.by_frame(late)
    refusal = SeenRefusal(failure.refusal.code, failure.refusal.reason, alert=rehearsal.alert)
    refusing = next((name for name, errors in _STAGES if failure.number in errors), None)
    if rehearsal.unshown is not None:
        refusing = "key"
    if refusing is None:
        # An error that no stage of ours has: how far OpenSSL came before it is not known.
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
                    _what_is_wrong(rehearsal, failure, facts),
                    _remedy(failure, rehearsal, trust, facts, config),
                )
            )
            result = "not reached"
        else:
            checks.append(Check(name, result, _passed(name, rehearsal, trust, facts) if result == "ok" else ""))
    return checks, refusal


def _passed(name: str, rehearsal: Rehearsal, trust: OuterTls, facts: CertificateFacts) -> str:
    match name:
        case "key":
            return facts.key
        case "issuer":
            return " < ".join(rehearsal.path[1:])
        case "purpose":
            return "any, since it names none" if facts.usages is None else ", ".join(facts.usages)
        case "revocation" if trust.crl_next_update is None:
            return "no tls.crl, so nobody is ever revoked"
        case "revocation":
            until = datetime.fromtimestamp(trust.crl_next_update or 0, UTC)
            return f"not on the list, which is good until {iso(until)}"
        case "signature and dates":
            end = facts.not_after.timestamp() if rehearsal.peer is None else rehearsal.peer.credential.not_after
            return f"until {iso(datetime.fromtimestamp(end, UTC))}"
    return ""


def _what_is_wrong(rehearsal: Rehearsal, failure: FailedVerification, facts: CertificateFacts) -> str:
    if rehearsal.unshown is not None:
        return f"{facts.key}; no function can show this certificate: {rehearsal.unshown}"
    reason = failure.refusal.reason
    return reason if failure.depth == 0 else f"{reason}: {_at(failure.depth, rehearsal)}"


def _at(depth: int, rehearsal: Rehearsal) -> str:
    """Whose certificate stands at ``depth`` of the chain."""
    return rehearsal.path[depth] if depth < len(rehearsal.path) else "an authority"


def _remedy(
    failure: FailedVerification, rehearsal: Rehearsal, trust: OuterTls, facts: CertificateFacts, config: Config
) -> str:
    section = config.tls
    client_ca = "tls.client_ca" if section is None else f"tls.client_ca ({section.client_ca})"
    crl = "tls.crl" if section is None else f"tls.crl ({section.crl})"
    authority = _at(failure.depth, rehearsal)
    is_own = failure.depth == 0
    match failure.number:
        case 0:
            return "issue it again, with a key that TLS 1.3 knows, such as P-256 or Ed25519"
        case 18 if failure.authority is None:
            return f"have it issued by an authority of {client_ca}; a certificate cannot vouch for itself"
        case 2 | 19 | 20 | 21 if not facts.names:
            return "its extensions cannot be parsed, so OpenSSL finds no issuer for it: issue it again with others"
        case 2 | 18 | 19 | 20 | 21 if failure.authority is not None:
            return (
                f"{failure.authority} of {client_ca} has expired, and with it all that it issued: have the "
                "certificate issued by another authority, or put that one's renewed certificate there"
            )
        case 2 | 19 | 20 | 21 if (rehearsal.missing or facts.issuer) in trust.authorities:
            return (
                f"the authority that issued {'it' if len(rehearsal.path) < 2 else rehearsal.path[-1]} has the same "
                f"name as one of {client_ca}, and another key: issue that again with this one, or add the other to the "
                "file"
            )
        case 2 | 19 | 20 | 21:
            return (
                f"no authority of {client_ca} leads to it: have it issued by one of those, add the authority above "
                f"{rehearsal.path[-1] if rehearsal.path else facts.subject} there, or put the missing intermediates "
                "behind the certificate in its file"
            )
        case 26 if is_own and facts.usages is not None and "clientAuth" not in facts.usages:
            return "issue it with the extended key usage clientAuth, as `frelay ca party` does"
        case 26 | 39 if is_own:
            return "issue it with the key usage digitalSignature, as `frelay ca party` does"
        case 26:
            return f"{authority} may not vouch for clients: have the certificate issued by one that may"
        case 25 | 32 | 79:
            return (
                f"{authority} may not have issued what it issued: have the certificate issued by an authority that may"
            )
        case 66:
            return "issue it with a stronger key, such as P-256 or Ed25519"
        case 67 | 68:
            return f"replace {authority}, whose key or signature is too weak to be believed"
        case 3 | 33:
            issuer = _at(min(failure.depth + 1, len(rehearsal.path) - 1), rehearsal)
            return f"{crl} must hold a list of every authority of the chain; add that of {issuer}"
        case 5 | 8 | 15 | 16 | 35 | 36 | 44 | 54:
            issuer = _at(min(failure.depth + 1, len(rehearsal.path) - 1), rehearsal)
            return (
                f"the list of {issuer} in {crl} does not count for it: publish a complete one, signed by that "
                "authority itself, and about such certificates"
            )
        case 12 | 11:
            return f"publish a list that is in date to {crl}; `frelay ca revoke` without a certificate renews it"
        case 23 if is_own:
            return "issue a new certificate with a new key; what is revoked stays so"
        case 23:
            return f"{authority} is revoked, and with it all that it issued: have the certificate issued by another"
        case 10 if is_own:
            return "issue a new one"
        case 10:
            return f"{authority} has expired, and with it all that it issued: renew it, then the certificate"
        case 9:
            return "wait until then, or set the clock right: of this machine, or of the one that issued it"
        case 47 | 48:
            return "its authority may not give such names: choose others, or have it issued by another authority"
    return "issue the certificate again"


# --- what its names say -------------------------------------------------------------------------------------------


def _names(facts: CertificateFacts) -> Check:
    ignored = f" ({len(facts.ignored)} ignored)" if facts.ignored else ""
    return Check("names", "ok", f"{', '.join(facts.names) or 'none'}{ignored}")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A configured route as ``choice`` wants it."""

    config: Route

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def parties(self) -> Parties:
        return Parties(self.config)


def _route(
    asked: Sequence[Route], found: Sequence[RouteFit], names: tuple[Name, ...], config: Config
) -> tuple[Check, SeenRefusal | None]:
    """Whether any of the routes asked for lets these names in, and if none does, what the relay answers."""
    if found:
        shown = ", ".join(f"{one.route} as {' or '.join(fit.party for fit in one.parties)}" for one in found[:_HINTS])
        more = f" and {len(found) - _HINTS} more" if len(found) > _HINTS else ""
        return Check("route", "ok", shown + more), None
    only = asked[0] if len(asked) == 1 else None
    neighbours = asked if only is None else _neighbours(only, config)
    join = None if only is None else Join(attempt="", route=only.name)
    try:
        choose(Table({one.name: _Candidate(one) for one in neighbours}), names, join, "")
    except NotAdmitted as error:
        text = f"fits none of {len(asked)} routes" if only is None else f"fits neither party of route {only.name}"
        if only is not None:
            text += "".join(f"; {party} is {_wanted(only, party)}" for party in _PARTIES)
        remedy = (
            "issue a certificate with a name that the route wants, or add one of this certificate's names to the "
            f"route{'' if only is None else f' in {only.source}'}"
        )
        refusal = SeenRefusal.by_frame(error.refusal)
        return Check("route", "refuses", text, remedy), refusal
    raise AssertionError("a route chosen for a certificate that fits none")


def _wanted(route: Route, party: PartyName) -> str:
    side = _side(route, party)
    if isinstance(side, Dial):
        return f"no function ({side})"
    selectors = [str(one) for one in side]
    more = f" or {len(selectors) - _HINTS} more" if len(selectors) > _HINTS else ""
    return " or ".join(selectors[:_HINTS]) + more


def _side(route: Route, party: PartyName) -> Party:
    return route.func1 if party == "func1" else route.func2


def _neighbours(route: Route, config: Config) -> list[Route]:
    """The routes that share an address with ``route``, itself included."""
    keys = set(listener_keys(route))
    return [one for one in config.routes if not keys.isdisjoint(listener_keys(one))]


def _how_to_ask(route: Route, parties: Sequence[Fit], shared: Mapping[ListenerKey, int]) -> str | None:
    """What a function must say beside showing its certificate; None where that is enough."""
    says = []
    key = max(listener_keys(route), key=lambda one: shared[one])
    if shared[key] > 1:
        says.append(
            f"{shared[key]} routes share {key.address}: ask for this one, by JOIN.route or SNI {route.name}.NAME"
        )
    if len(parties) > 1:
        says.append("it fits both parties: say which, by JOIN.party")
    return "; ".join(says) or None


# --- hints --------------------------------------------------------------------------------------------------------


def _hints(facts: CertificateFacts, routes: Sequence[Route]) -> Iterator[str]:
    """Where a claim of the certificate comes near what a route wants, best first, each said once."""
    selectors: dict[Selector, str] = {}
    for route in routes:
        for party in _PARTIES:
            side = _side(route, party)
            for one in () if isinstance(side, Dial) else side:
                selectors.setdefault(one, f"{party} of route {route.name}")
    ranked: dict[str, int] = {}
    for selector, whose in selectors.items():
        for claim in facts.claims:
            near = _nearness(claim, selector)
            if near is not None:
                rank, text = near
                ranked.setdefault(f"{whose} is {selector}: {text}", rank)
    yield from sorted(ranked, key=lambda text: ranked[text])
    if len(routes) == 1 and any(one.kind is Kind.SPKI for one in selectors):
        yield f"route {routes[0].name} pins a key, and this certificate has another: was the key renewed?"


def _nearness(claim: Claim, selector: Selector) -> tuple[int, str] | None:
    """How near ``claim`` comes to ``selector`` (0 is nearest), and in what; None if it does not."""
    if selector.kind is Kind.SPKI:
        return None
    text, wanted, word = claim.text, selector.pattern, _WORDS[selector.kind]
    shown = ascii(text[:_SHOWN])
    if claim.where == "common name":
        if _would_match(selector, text):
            return (
                0,
                f"the certificate has {shown} as its common name, which is never an identity; it must be a SAN {word}",
            )
        return None
    if claim.where != word:
        if _would_match(selector, text) or text == str(selector):
            return 1, f"the certificate has {shown} as {claim.where}, and it must be a SAN {word}"
        return None
    if text.rstrip(".").casefold() == wanted.casefold():
        what = "by a trailing dot" if text.endswith(".") else "in case, and a URI is compared octet by octet"
        return 2, f"the certificate's {shown} differs {what}"
    if "*" in text and "*" not in wanted:
        return None
    if selector.kind is Kind.URI:
        near = _near_uri(text, wanted)
        if near is not None:
            return 3, f"the certificate's {shown} {near}"
    elif "*" in wanted and text.casefold().endswith(wanted.rpartition("*")[2]):
        return 4, f"the certificate's {shown} has another number of labels, and '*' stands for exactly one"
    if _is_alike(text.rstrip(".").casefold(), wanted.casefold()):
        return 5, f"the certificate's {shown} is like it, and not the same"
    return None


def _would_match(selector: Selector, text: str) -> bool:
    try:
        name = dns_name(text) if selector.kind is Kind.DNS else Name(Kind.URI, text)
    except OddName:
        return False
    return selector.matches(name)


def _near_uri(text: str, wanted: str) -> str | None:
    (scheme, _, rest), (wanted_scheme, _, wanted_rest) = text.partition("://"), wanted.partition("://")
    authority, _, path = rest.partition("/")
    wanted_authority, _, wanted_path = wanted_rest.partition("/")
    if not path or not wanted_path or scheme != wanted_scheme:
        return None
    stand_in = Name(Kind.URI, f"{scheme}://{wanted_authority}/{path}")
    if authority != wanted_authority and Selector(Kind.URI, wanted).matches(stand_in):
        return f"is of another trust domain, {authority[:_SHOWN]!a}"
    if authority == wanted_authority and "*" in wanted and path.startswith(wanted_path.partition("*")[0]):
        return "has another number of segments, and '*' stands for exactly one whole segment"
    return None


def _is_alike(one: str, other: str) -> bool:
    if _DIGITS.sub("", one) == _DIGITS.sub("", other):
        return False  # func1 and func2 are brothers, not a slip of the finger
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    return matcher.real_quick_ratio() > _ALIKE and matcher.quick_ratio() > _ALIKE and matcher.ratio() > _ALIKE
