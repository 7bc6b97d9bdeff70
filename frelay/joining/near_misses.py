"""Near misses: where a name of a refused certificate is nearly what a route wants, and what the difference is.

They are hints for a person, who easily misses a wrong letter or a name in the wrong field. They decide nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Final

from frelay.config.model import Dial, Party, Route
from frelay.protocol.identity import Kind, Name, OddName, Selector, dns_name
from frelay.protocol.messages import PartyName
from frelay.tls.facts import CertificateFacts, Claim

__all__ = ["PARTIES", "near_misses", "side_of"]

PARTIES: Final[tuple[PartyName, ...]] = ("func1", "func2")
# Names that are at least so similar (from 0 to 1) are near misses. Two examples: a name of ten letters of which two are
# swapped has 0.9, and two names that share only their domain have 0.7.
_ALIKE: Final = 0.85
_SHOWN: Final = 128
_DIGITS: Final = re.compile(r"[0-9]+")
_WORDS: Final = {Kind.DNS: "DNS name", Kind.URI: "URI"}


def side_of(route: Route, party: PartyName) -> Party:
    """What ``route`` says of one of its parties."""
    return route.func1 if party == "func1" else route.func2


def near_misses(facts: CertificateFacts, routes: Sequence[Route]) -> Iterator[str]:
    """A hint for each claim of the certificate that comes near what one of ``routes`` wants; the nearest first."""
    selectors: dict[Selector, str] = {}
    for route in routes:
        for party in PARTIES:
            side = side_of(route, party)
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
    """How near ``claim`` comes to ``selector`` (0 is nearest), and the difference in words; None if it is not near."""
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
        return 5, f"the certificate's {shown} is similar, but not the same"
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
        return False  # func1 and func2 are two functions, not a typing error
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    return matcher.real_quick_ratio() > _ALIKE and matcher.quick_ratio() > _ALIKE and matcher.ratio() > _ALIKE
