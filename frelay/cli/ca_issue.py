"""``frelay ca init``, ``relay``, ``party`` and ``revoke``: write files, and print what was done and what is next."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from frelay.errors import printable
from frelay.pki.authority import Algorithm, Usage
from frelay.pki.directory import AuthorityDirectory
from frelay.tls.facts import CertificateFacts, certificate_facts, iso
from frelay.tls.identity import distinguished_name

__all__ = ["Names", "create_authority", "issue", "revoke"]


@dataclass(frozen=True, slots=True)
class Names:
    """The subject alternative names of a certificate."""

    dns: Sequence[str]
    uris: Sequence[str]
    ips: Sequence[str]


def create_authority(directory: Path, *, name: str, days: int, algorithm: Algorithm, force: bool) -> None:
    """Make an authority in ``directory``; raises CertificateError."""
    home = AuthorityDirectory(directory)
    home.create(name, days=days, algorithm=algorithm, force=force)
    facts = certificate_facts(home.load().certificate)
    _print_table(
        (home.certificate, f"{facts.subject}, {facts.key}, until {iso(facts.not_after)}: give it to everybody"),
        (home.key, "its key: signs certificates; never keep it on the relay's machine"),
        (home.crl, "who is revoked: nobody yet"),
    )
    _tell(f"next: frelay ca relay --ca {directory} --dns NAME")


def issue(
    ca: Path | None,
    name: str,
    usage: Usage,
    names: Names,
    *,
    days: int | None,
    algorithm: Algorithm,
    out: Path | None,
    force: bool,
) -> None:
    """Issue a certificate and write it with its key; raises CertificateError."""
    home = AuthorityDirectory.find(ca)
    issued = home.load().issue(
        common_name=name, dns=names.dns, uris=names.uris, ips=names.ips, usage=usage, days=days, algorithm=algorithm
    )
    certificate, key = home.keep(issued, name, directory=out, force=force)
    facts = certificate_facts(issued.certificate)
    shown = _hosts(facts) if usage == "relay" else _identities(facts)
    _print_table(
        (certificate, f"{', '.join(shown)}, until {iso(facts.not_after)}, serial {facts.serial}"),
        (key, f"its key: goes where {name} runs, nowhere else"),
    )
    if usage == "relay":
        _tell(f'next: in relay.toml, [tls] certificate = "{certificate}", private_key = "{key}"')
    else:
        _tell(f"next: in relay.toml, make {shown[0]} func1 or func2 of a route")


def revoke(ca: Path | None, given: Sequence[str], *, days: int | None, is_new: bool) -> None:
    """Write the next revocation list and print what was revoked; raises CertificateError."""
    done = AuthorityDirectory.find(ca).revoke(given, days=days, is_new=is_new)
    for one in done.asked:
        who = "" if one.certificate is None else f" {distinguished_name(partial(getattr, one.certificate, 'subject'))}"
        if one.before is None:
            print(f"revoked {one.serial:x}{who}")
        else:
            print(f"revoked {one.serial:x}{who} already, since {iso(one.before)}")
    if not done.asked:
        print("revoked nobody")
    print(
        f"{printable(str(done.path))}: number {done.number}, {done.entries} revoked, good until {iso(done.next_update)}"
    )
    _tell("next: a relay that reads this file applies it at once; copy it to all other relays, then reload them")


def _identities(facts: CertificateFacts) -> list[str]:
    return [name for name in facts.names if not name.startswith("spki:")]


def _hosts(facts: CertificateFacts) -> list[str]:
    """The names and addresses that a client may dial."""
    return [claim.text for claim in facts.claims if claim.where in ("DNS name", "IP address")]


def _print_table(*rows: tuple[Path, str]) -> None:
    shown = [(printable(str(path)), text) for path, text in rows]
    width = max(len(path) for path, _ in shown)
    for path, text in shown:
        print(f"{path:<{width}}  {text}")


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr)
