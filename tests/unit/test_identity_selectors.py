"""Selectors match whole names of their own kind, and nothing that only looks similar."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from frelay.pki.authority import Authority
from frelay.protocol.identity import (
    Kind,
    Name,
    OddName,
    Selector,
    dns_name,
    match,
    parse_selector,
    spki_name,
    spki_of_certificate,
    uri_names,
)
from frelay.protocol.selector_set import SelectorSet
from support.certs import TestAuthority

# No deadline for an example, since the machine may be busy with other tests.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

labels = st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,6}[a-z0-9_])?", fullmatch=True)
dns_texts = (
    st.lists(labels, min_size=1, max_size=4).map(".".join).filter(lambda text: not re.fullmatch(r"\d+(\.\d+){3}", text))
)
segments = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,6}", fullmatch=True)
paths = st.lists(segments, min_size=1, max_size=4)
authorities = st.sampled_from(["spiffe://acme", "https://acme:8443", "custom+x://user@host"])
uri_texts = st.builds(lambda head, path: "/".join([head, *path]), authorities, paths)
# Any character may be the change, dangerous ones more often.
characters = st.one_of(st.sampled_from("\0\n .*%/?#@:\\-_\u212a\u0131\u017f\u3002\uff0e\u200b"), st.characters())
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)


@st.composite
def changed(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> tuple[str, str]:
    """A text and the same text with one character replaced, put in or taken out."""
    text = draw(texts)
    at = draw(st.integers(0, len(text)))
    how = draw(st.sampled_from(["replace", "insert", "delete"]))
    middle = "" if how == "delete" else draw(characters)
    other = text[:at] + middle + text[at + (how != "insert") :]
    assume(other != text)
    return text, other


def uri_name(text: str) -> Name:
    (name,) = uri_names([text])
    return name


def every_name(text: str) -> list[Name]:
    """``text`` as every kind of name that it can be."""
    names: list[Name] = []
    for make in (dns_name, uri_name, spki_name):
        try:
            names.append(make(text))
        except OddName:
            continue
    return names


# --- exact ------------------------------------------------------------------------------------------------------


@unhurried
@given(changed(dns_texts))
@example(("key.acme", "\u212aey.acme"))  # the Kelvin sign, which lower() turns into a 'k'
@example(("func1.demo", "func1.demo\n"))
def test_a_dns_name_with_one_change_does_not_match(pair: tuple[str, str]) -> None:
    """TESTPLAN 3: prefix, suffix, NUL, trailing dot and every other single change; only ASCII case folds."""
    text, other = pair
    selector = parse_selector(f"dns:{text}")
    assert selector.matches(dns_name(text))
    try:
        name = dns_name(other)
    except OddName:
        return
    assert other.isascii()
    assert selector.matches(name) == (other.lower() == text)


@unhurried
@given(changed(uri_texts))
def test_a_uri_with_one_change_does_not_match(pair: tuple[str, str]) -> None:
    """TESTPLAN 5: URIs are compared octet by octet, and case counts."""
    text, other = pair
    selector = parse_selector(f"uri:{text}")
    assert selector.matches(uri_name(text))
    try:
        name = uri_name(other)
    except OddName:
        return
    assert not selector.matches(name)


@unhurried
@given(changed(digests))
def test_a_key_pin_with_one_change_does_not_match(pair: tuple[str, str]) -> None:
    text, other = pair
    selector = parse_selector(f"spki:sha256:{text}")
    assert selector.matches(spki_name(text))
    try:
        name = spki_name(other)
    except OddName:
        return
    assert selector.matches(name) == (other.lower() == text)


@pytest.mark.parametrize("text", ["func1.demo", "spiffe://acme/func1", "ab" * 32])
def test_the_same_text_of_another_kind_does_not_match(text: str) -> None:
    """TESTPLAN 4: the type of a name is part of it."""
    for name in every_name(text):
        for kind in Kind:
            assert Selector(kind, text).matches(name) == (kind is name.kind)
    assert every_name(text)


@unhurried
@given(st.one_of(dns_texts, uri_texts, digests))
def test_the_text_of_a_name_read_as_a_selector_matches_it_alone(text: str) -> None:
    """``peer`` of a PAIRED may be copied into a route file: it matches that function and no other."""
    for name in every_name(text):
        selector = parse_selector(str(name))
        assert selector == Selector(name.kind, name.value)
        assert selector.matches(name)
        assert "*" not in selector.pattern


def test_a_wildcard_in_a_certificate_is_no_name() -> None:
    """Otherwise a name with a wildcard, used as a selector, would match other functions."""
    for uri in ("https://acme/jobs/*", "https://*/jobs", "custom:*"):
        with pytest.raises(OddName, match="wildcard"):
            uri_names([uri])
    with pytest.raises(OddName, match="label"):
        dns_name("*.demo")


# --- the wildcard -----------------------------------------------------------------------------------------------


@st.composite
def dns_patterns(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """The labels of a pattern with at least one ``*`` and one label, and the labels of a name that may fit it."""
    pattern = draw(st.lists(labels, min_size=2, max_size=4))
    name = list(pattern)
    stars = draw(st.sets(st.integers(0, len(pattern) - 1), min_size=1, max_size=len(pattern) - 1))
    for at in stars:
        pattern[at] = "*"
        name[at] = draw(labels)
    for _ in range(draw(st.integers(0, 2))):
        how, at = draw(st.sampled_from(["insert", "delete", "replace"])), draw(st.integers(0, len(name) - 1))
        if how == "insert":
            name.insert(at, draw(labels))
        elif how == "replace":
            name[at] = draw(labels)
        elif len(name) > 1:
            del name[at]
    return pattern, name


@unhurried
@given(dns_patterns())
def test_a_star_stands_for_exactly_one_label(pair: tuple[list[str], list[str]]) -> None:
    pattern, found = pair
    text = ".".join(found)
    assume(not re.fullmatch(r"\d+(\.\d+){3}", text))
    selector = parse_selector(f"dns:{'.'.join(pattern)}")
    # Compare with another implementation: one regular expression over the whole text.
    oracle = re.compile(r"\.".join("[^.]+" if label == "*" else re.escape(label) for label in pattern))
    assert selector.matches(dns_name(text)) == (oracle.fullmatch(text) is not None)


@st.composite
def uri_patterns(draw: st.DrawFn) -> tuple[str, str]:
    """A URI pattern with at least one ``*``, and a URI that may fit it."""
    head = draw(authorities)
    pattern = draw(paths)
    name = list(pattern)
    for at in draw(st.sets(st.integers(0, len(pattern) - 1), min_size=1)):
        pattern[at] = "*"
        name[at] = draw(st.one_of(segments, st.sampled_from(["", ".", "..", "%2e%2E", "a%2Fb", "a?b", "a#b", "..."])))
    if draw(st.booleans()):
        name.insert(draw(st.integers(0, len(name))), draw(segments))
    if draw(st.booleans()) and len(name) > 1:
        del name[draw(st.integers(0, len(name) - 1))]
    other = draw(st.one_of(st.just(head), authorities))
    return "/".join([head, *pattern]), "/".join([other, *name])


@unhurried
@given(uri_patterns())
def test_a_star_stands_for_exactly_one_plain_segment(pair: tuple[str, str]) -> None:
    pattern, text = pair
    selector = parse_selector(f"uri:{pattern}")
    try:
        name = uri_name(text)
    except OddName:
        return
    any_segment = r"(?!\.{1,2}(?:/|\Z))[^/?#%]+"
    oracle = re.compile(any_segment.join(re.escape(part) for part in pattern.split("*")))
    assert selector.matches(name) == (oracle.fullmatch(text) is not None)


@pytest.mark.parametrize("segment", ["", ".", "..", "%2e", "%2E%2e", "a%2Fb", "a/b", "a?b", "a#b", "?", "#"])
@pytest.mark.parametrize("pattern", ["https://acme/jobs/*", "https://acme/*/run"])
def test_a_star_never_fits_what_may_be_read_as_another_path(pattern: str, segment: str) -> None:
    name = uri_name(pattern.replace("*", segment))
    assert not parse_selector(f"uri:{pattern}").matches(name)


@pytest.mark.parametrize("mark", "?#")
def test_a_star_stops_at_the_first_query_or_fragment(mark: str) -> None:
    """Not at the last mark: the text between them is no part of the path."""
    selector = parse_selector(f"uri:https://acme/*{mark}z")
    assert selector.matches(uri_name(f"https://acme/x{mark}z"))
    assert not selector.matches(uri_name(f"https://acme/x{mark}y{mark}z"))


@unhurried
@given(
    st.one_of(dns_patterns().map(lambda pair: "dns:" + ".".join(pair[0])), uri_patterns().map(lambda p: "uri:" + p[0]))
)
def test_a_selector_is_its_text(text: str) -> None:
    selector = parse_selector(text)
    assert str(selector) == text
    assert parse_selector(str(selector)) == selector


@unhurried
@given(
    st.sampled_from(["dns:", "uri:", "spki:sha256:", "uri:spiffe:", "DNS:", ""]),
    st.one_of(changed(st.one_of(dns_texts, uri_texts, digests)).map(lambda pair: pair[1]), st.text()),
)
def test_any_text_is_a_selector_or_a_value_error(kind: str, rest: str) -> None:
    try:
        selector = parse_selector(kind + rest)
    except ValueError:
        return
    assert parse_selector(str(selector)) == selector
    assert str(selector).lower() == (kind + rest).lower()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "func1.demo",
        "DNS:func1.demo",
        " dns:func1.demo",
        "dns:",
        "dns:*",
        "dns:*.*",
        "dns:func1.demo.",
        "dns:func*.demo",
        "dns:**.demo",
        "dns:10.0.0.1",
        "dns:\u212aey.acme",
        "dns:" + "a" * 64,
        "dns:" + ".".join(["a" * 63] * 4),
        "uri:",
        "uri:/jobs/*",
        "uri:*",
        "uri:urn:*",
        "uri:file:///*",
        "uri:*://acme/jobs",
        "uri:https://*/jobs",
        "uri:https://*.acme/jobs",
        "uri:https://*@acme/jobs",
        "uri:https://acme/jobs/f*",
        "uri:https://acme/jobs?x=*",
        "uri:https://acme/jobs#*",
        "uri:https://acme/100%",
        "uri:https://[::1/jobs",
        "uri:spiffe://*/jobs",
        "uri:spiffe://ACME/jobs",
        "uri:spiffe://acme",
        "uri:spiffe://acme/",
        "uri:spiffe://acme/../jobs",
        "uri:spiffe://acme/*/..",
        "uri:spiffe://acme/*/%2E",
        "uri:spiffe://acme:1/jobs",
        "uri:SPIFFE://acme/jobs",
        "uri:https://acme/" + "x" * 2048,
        "spki:" + "ab" * 32,
        "spki:md5:" + "ab" * 32,
        "spki:sha256:" + "ab" * 31,
        "spki:sha256:*",
        "group:workers",
    ],
)
def test_what_is_no_selector_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
        parse_selector(text)


@pytest.mark.parametrize("kind", ["dns", "uri"])
def test_a_name_may_be_as_long_as_it_may_and_no_longer(kind: str) -> None:
    """253 characters of DNS (RFC 1035, less the length octets), 2,048 of a URI (SPIFFE-ID, 2.3)."""
    longest = {"dns": ".".join(["a" * 63] * 3 + ["a" * 61]), "uri": "https://acme/".ljust(2048, "x")}[kind]
    assert parse_selector(f"{kind}:{longest}").pattern == longest
    with pytest.raises(ValueError, match=r"of (254|2049) characters"):
        parse_selector(f"{kind}:{longest}x")


def test_match_gives_the_first_name_that_any_selector_fits() -> None:
    names = [uri_name("spiffe://acme/jobs/a"), dns_name("a.acme")]
    assert match([parse_selector("dns:*.acme"), parse_selector("uri:spiffe://acme/jobs/*")], names) == names[0]
    assert match([parse_selector("dns:*.acme")], names) == names[1]
    assert match([parse_selector("dns:b.acme")], names) is None
    assert match([], names) is None


any_dns = st.lists(st.sampled_from(["*", "a", "b", "c"]), min_size=1, max_size=4).map(".".join)
any_uri = st.builds(
    lambda head, path, tail: "/".join([head, *path]) + tail,
    st.sampled_from(["spiffe://acme", "https://acme", "https://other", "urn:acme"]),
    st.lists(st.sampled_from(["*", "a", "b", "", "..", "%41"]), max_size=3),
    st.sampled_from(["", "?q", "#f"]),
)
any_pattern = st.one_of(
    st.tuples(st.just(Kind.DNS), any_dns),
    st.tuples(st.just(Kind.URI), any_uri),
    st.tuples(st.just(Kind.SPKI), st.sampled_from(["ab" * 32, "cd" * 32])),
)


@unhurried
@example([(Kind.URI, "https://acme/*")], [], [(Kind.URI, f"https://acme/{part}") for part in ("", "..", "%41", "a")])
@example([(Kind.URI, "https://acme/*/b")], [], [(Kind.URI, f"https://acme/{part}/b") for part in ("", ".", "%", "a")])
@given(
    patterns=st.lists(any_pattern, max_size=12),
    others=st.lists(any_pattern, max_size=3),
    values=st.lists(any_pattern, max_size=12),
)
def test_a_set_of_selectors_matches_what_one_of_them_matches(
    patterns: list[tuple[Kind, str]], others: list[tuple[Kind, str]], values: list[tuple[Kind, str]]
) -> None:
    """Also for selectors and names that no file can have: the set must decide nothing by itself."""
    selectors, more = [Selector(*one) for one in patterns], [Selector(*one) for one in others]
    names = [Name(*one) for one in values]
    assert SelectorSet(selectors).first(names) == match(selectors, names)
    both = SelectorSet.union([SelectorSet(selectors), SelectorSet(more)])
    assert both.first(names) == match([*selectors, *more], names)
    for name in names:
        assert both.matches(name) is any(selector.matches(name) for selector in [*selectors, *more])


# --- key pins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["p256", "ed25519"])
def test_the_pin_is_the_hash_of_the_public_key(algorithm: str) -> None:
    certificate = Authority.create("x", algorithm=algorithm).certificate  # type: ignore[arg-type]
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki_of_certificate(certificate.public_bytes(Encoding.DER)).value == hashlib.sha256(spki).hexdigest()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
@pytest.mark.parametrize(
    "kind",
    [
        ["rsa:2048"],
        ["rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048"],
        ["ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-pkeyopt", "point-format:compressed"],
    ],
    ids=["rsa", "rsa-pss", "compressed point"],
)
def test_the_pin_is_the_one_that_openssl_gives(kind: list[str], tmp_path: Path) -> None:
    """Also for keys that get other bytes when they are parsed and encoded again."""
    run = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=x", "-keyout", "/dev/null", "-newkey", *kind]
    certificate = subprocess.run(run, check=True, capture_output=True).stdout
    public = subprocess.run(
        ["openssl", "x509", "-noout", "-pubkey"], input=certificate, check=True, capture_output=True
    )
    spki = subprocess.run(
        ["openssl", "asn1parse", "-noout", "-out", "/dev/stdout"],
        input=public.stdout,
        check=True,
        capture_output=True,
    ).stdout
    der = x509.load_pem_x509_certificate(certificate).public_bytes(Encoding.DER)
    assert spki_of_certificate(der).value == hashlib.sha256(spki).hexdigest()


def test_half_a_certificate_has_no_pin() -> None:
    der = TestAuthority().party(dns=["func1.demo"]).certificate.public_bytes(Encoding.DER)
    for size in range(len(der)):
        with pytest.raises(OddName, match="not a DER certificate"):
            spki_of_certificate(der[:size])


def test_a_length_that_is_not_said_is_no_der() -> None:
    """BER has such lengths, with two zero octets as the end; two parsers may read two different certificates."""
    der = CERTIFICATE
    assert der[:2] == b"\x30\x82"
    with pytest.raises(OddName, match="indefinite length"):
        spki_of_certificate(b"\x30\x80" + der[4:] + b"\0\0")


@unhurried
@given(st.data())
def test_a_pin_of_garbage_is_odd_or_a_name(data: st.DataObject) -> None:
    der = bytearray(CERTIFICATE)
    for _ in range(data.draw(st.integers(1, 3))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    with suppress(OddName):
        assert spki_of_certificate(bytes(der)).kind is Kind.SPKI


CERTIFICATE = TestAuthority().party(dns=["func1.demo"]).certificate.public_bytes(Encoding.DER)
