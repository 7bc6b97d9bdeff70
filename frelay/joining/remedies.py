"""Remedies: what to do about each reason for which OpenSSL refuses a certificate."""

from __future__ import annotations

from frelay.config.model import Config
from frelay.tls.dry_run import HandshakeResult
from frelay.tls.facts import CertificateFacts
from frelay.tls.trust import FailedVerification, OuterTls

__all__ = ["certificate_at", "remedy_for"]


def certificate_at(depth: int, handshake: HandshakeResult) -> str:
    """The subject of the certificate at ``depth`` of the chain, in words."""
    return handshake.path[depth] if depth < len(handshake.path) else "an authority"


def remedy_for(
    failure: FailedVerification, handshake: HandshakeResult, trust: OuterTls, facts: CertificateFacts, config: Config
) -> str:
    """A sentence that tells a person what to do."""
    section = config.tls
    client_ca = "tls.client_ca" if section is None else f"tls.client_ca ({section.client_ca})"
    crl = "tls.crl" if section is None else f"tls.crl ({section.crl})"
    authority = certificate_at(failure.depth, handshake)
    is_own = failure.depth == 0
    match failure.number:
        case 0:
            return "issue it again, with a key that TLS 1.3 knows, such as P-256 or Ed25519"
        case 18 if failure.authority is None:
            return f"have it issued by an authority of {client_ca}; a self-signed certificate is not trusted"
        case 2 | 19 | 20 | 21 if not facts.names:
            return "its extensions cannot be parsed, so OpenSSL finds no issuer for it: issue it again with others"
        case 2 | 18 | 19 | 20 | 21 if failure.authority is not None:
            return (
                f"{failure.authority} of {client_ca} has expired, and with it all that it issued: have the "
                "certificate issued by another authority, or put that one's renewed certificate there"
            )
        case 2 | 19 | 20 | 21 if (handshake.missing or facts.issuer) in trust.authorities:
            return (
                f"the authority that issued {'it' if len(handshake.path) < 2 else handshake.path[-1]} has the same "
                f"name as one of {client_ca}, and another key: have it issued again by the one in the file, or add the "
                "other one to the file"
            )
        case 2 | 19 | 20 | 21:
            return (
                f"no authority of {client_ca} leads to it: have it issued by one of those, add the authority above "
                f"{handshake.path[-1] if handshake.path else facts.subject} there, or put the missing intermediates "
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
            return f"replace {authority}, whose key or signature is too weak"
        case 3 | 33:
            issuer = certificate_at(min(failure.depth + 1, len(handshake.path) - 1), handshake)
            return f"{crl} must hold a list of every authority of the chain; add that of {issuer}"
        case 5 | 8 | 15 | 16 | 35 | 36 | 44 | 54:
            issuer = certificate_at(min(failure.depth + 1, len(handshake.path) - 1), handshake)
            return (
                f"the list of {issuer} in {crl} does not cover it: publish a complete one, signed by that authority "
                "itself, that covers such certificates"
            )
        case 12 | 11:
            return f"publish a list that is in date to {crl}; `frelay ca revoke` without a certificate renews it"
        case 23 if is_own:
            return "issue a new certificate with a new key; a revoked one stays revoked"
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
