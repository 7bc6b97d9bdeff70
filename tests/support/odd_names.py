"""Names that a sloppy verifier would accept: none may match the selector beside which it stands.

:data:`ODD_DNS`, :data:`ODD_SPIFFE` and :data:`ODD_URIS` must never match ``dns:func1.demo``,
``uri:spiffe://acme/jobs/func1`` and ``uri:https://acme/jobs/func1``; parametrise over them.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ODD_DNS", "ODD_SPIFFE", "ODD_URIS", "SPIFFE_ID"]

SPIFFE_ID: Final = "spiffe://acme/jobs/func1"

# TESTPLAN 3: as octets, since not all of them can be written as text. None of them equals `func1.demo`.
ODD_DNS: Final[dict[str, bytes]] = {
    "nul": b"func1.demo\0.evil",
    "nul at the end": b"func1.demo\0",
    "trailing dot": b"func1.demo.",
    "doubled dot": b"func1..demo",
    "wildcard": b"*.demo",
    "wildcard alone": b"*",
    "partial wildcard": b"func*.demo",
    "prefix": b"func1.dem",
    "suffix": b"func1.demo.evil",
    "label before": b"evil.func1.demo",
    "space": b"func1.demo ",
    "line end": b"func1.demo\n",
    "empty": b"",
    "utf-8": "f\u00fcnc1.demo".encode(),
    "cyrillic look-alike": "func1.d\u0435mo".encode(),
    "fullwidth dot": "func1\uff0edemo".encode(),
    "latin-1": b"f\xfcnc1.demo",
    "A-label": b"xn--fnc1-0ra.demo",
}

# TESTPLAN 5: the URIs of one certificate each; none is SPIFFE_ID.
ODD_SPIFFE: Final[dict[str, tuple[str, ...]]] = {
    "wrong trust domain": ("spiffe://evil/jobs/func1",),
    "trust domain as prefix": ("spiffe://acme.evil/jobs/func1",),
    "trust domain in capitals": ("spiffe://ACME/jobs/func1",),
    "scheme in capitals": ("SPIFFE://acme/jobs/func1",),
    "another scheme": ("https://acme/jobs/func1",),
    "two SPIFFE IDs": (SPIFFE_ID, "spiffe://acme/jobs/other"),
    "one SPIFFE ID twice": (SPIFFE_ID, SPIFFE_ID),
    "another URI beside": (SPIFFE_ID, "https://acme/"),
    "userinfo": ("spiffe://user@acme/jobs/func1",),
    "userinfo look-alike": ("spiffe://acme@evil/jobs/func1",),
    "port": ("spiffe://acme:443/jobs/func1",),
    "query": ("spiffe://acme/jobs/func1?x=1",),
    "empty query": ("spiffe://acme/jobs/func1?",),
    "fragment": ("spiffe://acme/jobs/func1#x",),
    "escaped slash": ("spiffe://acme/jobs%2Ffunc1",),
    "escaped letter": ("spiffe://acme/jobs/%66unc1",),
    "dot dot": ("spiffe://acme/other/../jobs/func1",),
    "dot dot at the end": ("spiffe://acme/jobs/func1/x/..",),
    "dot": ("spiffe://acme/jobs/./func1",),
    "escaped dot dot": ("spiffe://acme/x/%2e%2e/jobs/func1",),
    "doubled slash": ("spiffe://acme//jobs/func1",),
    "trailing slash": ("spiffe://acme/jobs/func1/",),
    "no path": ("spiffe://acme",),
    "no trust domain": ("spiffe:///jobs/func1",),
    "no authority": ("spiffe:acme/jobs/func1",),
    "backslash": ("spiffe://acme/jobs\\func1",),
    "nul": ("spiffe://acme/jobs/func1\0/x",),
    "space": ("spiffe://acme/jobs/func1 ",),
    "not ASCII": ("spiffe://acme/jobs/func1\u0301",),
    "wildcard": ("spiffe://acme/jobs/*",),
    "case of the path": ("spiffe://acme/jobs/Func1",),
    "too long": ("spiffe://acme/jobs/func1/" + "x" * 2048,),
}

# TESTPLAN 5, beyond SPIFFE: valid URIs, all different from ``https://acme/jobs/func1``. A verifier that normalises URIs
# would take them for it.
ODD_URIS: Final[dict[str, str]] = {
    "userinfo": "https://user@acme/jobs/func1",
    "userinfo look-alike": "https://acme@evil/jobs/func1",
    "port": "https://acme:443/jobs/func1",
    "query": "https://acme/jobs/func1?x=1",
    "empty query": "https://acme/jobs/func1?",
    "fragment": "https://acme/jobs/func1#x",
    "escaped slash": "https://acme/jobs%2Ffunc1",
    "escaped letter": "https://acme/jobs/%66unc1",
    "dot dot": "https://acme/other/../jobs/func1",
    "dot dot at the end": "https://acme/jobs/func1/..",
    "dot": "https://acme/./jobs/func1",
    "escaped dot dot": "https://acme/jobs/%2e%2e",
    "doubled slash": "https://acme//jobs/func1",
    "trailing slash": "https://acme/jobs/func1/",
    "scheme in capitals": "HTTPS://acme/jobs/func1",
    "host in capitals": "https://ACME/jobs/func1",
    "case of the path": "https://acme/Jobs/func1",
    "trailing dot": "https://acme./jobs/func1",
    "A-label": "https://xn--acm-dma/jobs/func1",
    "no host": "https:///jobs/func1",
    "path alone": "https:/jobs/func1",
}
