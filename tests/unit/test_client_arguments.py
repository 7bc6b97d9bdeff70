"""``connect`` checks its arguments before it dials, and its errors name the wrong one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives import serialization

import frelay
from frelay.client.options import JoinPlan
from frelay.errors import CertificateError
from frelay.protocol.identity import dns_name
from support.certs import TestAuthority

# No server listens on port 1 of loopback, and no test should get as far as dialling it.
NOWHERE: Final = "127.0.0.1:1"


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """Correct arguments."""
    ca = TestAuthority()
    cert, key = ca.party(dns=["func1.demo"]).write(tmp_path, "func1")
    return {"cert": cert, "key": key, "ca": ca.write(tmp_path), "peer": "dns:func2.demo"}


def test_right_arguments_get_as_far_as_dialling(arguments: dict[str, Any]) -> None:
    """Without this test the ones below would prove nothing."""
    with pytest.raises(frelay.RelayUnreachable, match=r"no connection to 127\.0\.0\.1:1: .*refused"):
        frelay.connect(NOWHERE, **arguments)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("what", ["cert", "key", "ca"])
def test_a_missing_file_is_named(arguments: dict[str, Any], tmp_path: Path, what: str, as_text: bool) -> None:
    path = tmp_path / "not there.pem"
    with pytest.raises(CertificateError, match=rf"{what}: there is no file {path}"):
        frelay.connect(NOWHERE, **{**arguments, what: str(path) if as_text else path})


@pytest.mark.parametrize("what", ["inner_cert", "inner_ca"])
def test_a_missing_inner_file_is_named(arguments: dict[str, Any], tmp_path: Path, what: str) -> None:
    path = tmp_path / "not-there.pem"
    with pytest.raises(CertificateError, match=rf"{what.removeprefix('inner_')}: there is no file {path}"):
        frelay.connect(NOWHERE, **{**arguments, what: path})


@pytest.mark.parametrize("what", ["cert", "key", "ca"])
def test_a_directory_in_place_of_a_file_is_named(arguments: dict[str, Any], tmp_path: Path, what: str) -> None:
    with pytest.raises(CertificateError, match=rf"{what}: {tmp_path} cannot be read: Is a directory"):
        frelay.connect(NOWHERE, **{**arguments, what: tmp_path})


@pytest.mark.parametrize("content", [b"", b"no PEM\n", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_ca_file_without_certificate_is_named(arguments: dict[str, Any], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.pem"
    path.write_bytes(content)
    with pytest.raises(CertificateError, match=rf"ca: {path} holds no readable PEM certificate"):
        frelay.connect(NOWHERE, **{**arguments, "ca": path})


def test_a_key_of_another_certificate_is_named(arguments: dict[str, Any], tmp_path: Path) -> None:
    _, other = TestAuthority().party(dns=["func1.demo"]).write(tmp_path, "other")
    with pytest.raises(CertificateError, match=rf"{arguments['cert']} and {other} are no PEM certificate and its key"):
        frelay.connect(NOWHERE, **{**arguments, "key": other})


def test_an_encrypted_key_is_refused_and_nobody_is_asked(arguments: dict[str, Any], tmp_path: Path) -> None:
    """OpenSSL would ask for the passphrase on the terminal, and a function would hang there."""
    key = serialization.load_pem_private_key(Path(arguments["key"]).read_bytes(), None)
    path = tmp_path / "encrypted.key"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    with pytest.raises(CertificateError, match=rf"key: {path} is encrypted"):
        frelay.connect(NOWHERE, **{**arguments, "key": path})


def test_one_file_may_hold_certificate_and_key(arguments: dict[str, Any], tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(Path(arguments["cert"]).read_bytes() + Path(arguments["key"]).read_bytes())
    with pytest.raises(frelay.RelayUnreachable):
        frelay.connect(NOWHERE, **{**arguments, "cert": both, "key": None})
    with pytest.raises(CertificateError, match=r"func1\.pem does not hold both .* with key="):
        frelay.connect(NOWHERE, **{**arguments, "key": None})
    del arguments["key"]
    with pytest.raises(frelay.RelayUnreachable):
        frelay.connect(NOWHERE, **{**arguments, "cert": both})


@pytest.mark.parametrize(
    "address",
    [
        *("", "relay", "relay:", ":9001", "relay:port", "relay:0", "relay:65536", "relay:9001:9002", "::1:9001"),
        *("[::1]", "relay:9001 ", "https://relay:9001", "relay:-1", "relay:\u0661"),
        *("re lay:9001", "relay\r\nX: y:9001", "relay\n:9001", "relay\0:9001", "rel\u202eay:9001", "relay:9001\n"),
    ],
)
def test_a_bad_address_is_shown_with_the_way_to_write_it(arguments: dict[str, Any], address: str) -> None:
    with pytest.raises(ValueError, match=r"is not an address: write host:port, or \[v6\]:port"):
        frelay.connect(address, **arguments)


@pytest.mark.parametrize("peer", ["", "func2.demo", "cn:func2.demo", "spki:md5:00", "dns:*", [], ["dns:a.demo", "x"]])
def test_a_bad_peer_is_an_error_before_anything_is_sent(arguments: dict[str, Any], peer: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"is not a selector|peer= names nobody|public-key pins|would match any"):
        frelay.connect(NOWHERE, **{**arguments, "peer": peer})


def test_peer_must_be_given(arguments: dict[str, Any]) -> None:
    """There is no default: the caller must name the other function."""
    del arguments["peer"]
    with pytest.raises(TypeError, match="peer"):
        frelay.connect(NOWHERE, **arguments)


def test_nothing_is_printed(arguments: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(frelay.RelayUnreachable):
        frelay.connect(NOWHERE, **arguments)
    assert capfd.readouterr() == ("", "")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "given", "expected"),
    [
        ("relay.demo:9001", None, "relay.demo"),
        ("relay.demo.:9001", None, "relay.demo"),
        ("127.0.0.1:9001", "relay.demo.", "relay.demo"),
        ("[fe80::1%eth0]:9001", None, "fe80::1"),
        ("[::1]:9001", None, "::1"),
    ],
)
def test_a_name_may_be_absolute(arguments: dict[str, Any], address: str, given: str | None, expected: str) -> None:
    """The look-up keeps the dot at its end; certificates and SNI have none."""
    plan = JoinPlan.make(address, server_name=given, **arguments)
    assert plan.server_name == expected
    assert plan.host == address.rpartition(":")[0].strip("[]")


@pytest.mark.parametrize("peer", ["dns:func2.demo.", ["dns:a.demo", "dns:func2.demo."], "dns:*.demo."])
def test_the_name_of_a_peer_may_be_absolute(arguments: dict[str, Any], peer: str | list[str]) -> None:
    plan = JoinPlan.make(NOWHERE, **{**arguments, "peer": peer})
    assert any(selector.matches(dns_name("func2.demo")) for selector in plan.expected)


@pytest.mark.parametrize("peer", ["dns:func2.demo..", "dns:.", "dns:.demo", "uri:spiffe://acme./x/."])
def test_other_dots_are_none(arguments: dict[str, Any], peer: str) -> None:
    with pytest.raises(ValueError, match=r"label|segment|trust domain|empty"):
        JoinPlan.make(NOWHERE, **{**arguments, "peer": peer})


@pytest.mark.parametrize(
    "name", [".", "..", ".demo", "relay..demo", "relay.demo..", "a b", "a\0b", "a" * 64, "r\u00e9" * 60]
)
def test_a_server_name_that_is_none_is_found_before_anything_is_dialled(arguments: dict[str, Any], name: str) -> None:
    """The ssl module would find it in the middle of the joining."""
    with pytest.raises(ValueError, match=r"server_name: .* is not a host name"):
        frelay.connect(NOWHERE, server_name=name, **arguments)


def test_a_wait_is_a_number(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wait: this is not a number"):
        frelay.connect(NOWHERE, wait=math.nan, **arguments)
    assert JoinPlan.make(NOWHERE, wait=math.inf, **arguments).wait is None


def test_a_proxy_of_the_environment_that_cannot_be_used_is_no_fault_of_the_call(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy.acme:1080")
    with pytest.raises(frelay.RelayUnreachable, match="HTTPS_PROXY"):
        frelay.connect("relay.acme:9001", **arguments)
    with pytest.raises(ValueError, match="socks5"):
        frelay.connect("relay.acme:9001", proxy="socks5://proxy.acme:1080", **arguments)


# --- meeting by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meet", ["", "two words", "caf\u00e9", "x" * 129, "line\n", "\x00", 7, b"bytes"])
def test_a_key_is_visible_ascii(arguments: dict[str, Any], meet: Any) -> None:
    with pytest.raises(ValueError, match=r"meet=.*: 1 to 128 characters of visible ASCII expected"):
        frelay.connect(NOWHERE, **arguments, meet=meet)


@pytest.mark.parametrize("partner", [[], (), ["dns:a.demo"] * 17, "a.demo", ["dns:a.demo", "dns:"], [7]])
def test_a_list_of_partners_is_selectors(arguments: dict[str, Any], partner: Any) -> None:
    with pytest.raises(ValueError, match=r"^partner: "):
        frelay.connect(NOWHERE, **arguments, meet="job", partner=partner)


def test_partners_need_a_key(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="partner: it works only together with meet"):
        frelay.connect(NOWHERE, **arguments, partner="dns:a.demo")


def test_a_join_that_does_not_fit_a_frame_is_an_error_before_dialling(arguments: dict[str, Any]) -> None:
    """The relay would answer protocol-error; and 4096 bytes is a limit that nobody sees in the arguments."""
    names = [f"uri:spiffe://acme/{number}/{'x' * 230}" for number in range(16)]
    with pytest.raises(ValueError, match=r"JOIN too long: a JOIN payload of \d+ bytes \(at most 4096\)"):
        frelay.connect(NOWHERE, **arguments, meet="job", partner=names)
    with pytest.raises(frelay.RelayUnreachable):
        frelay.connect(NOWHERE, **arguments, meet="job", partner=names[:15])


def test_a_partner_is_written_like_a_peer(arguments: dict[str, Any]) -> None:
    """One name or several; the dot at the end of an absolute name is no part of it."""
    plan = JoinPlan.make(NOWHERE, **arguments, meet="job", partner="dns:a.demo.")
    assert (plan.meet, plan.partner) == ("job", ("dns:a.demo",))
    assert JoinPlan.make(NOWHERE, **arguments, meet="job", partner=("dns:a", "dns:b")).partner == ("dns:a", "dns:b")
    assert JoinPlan.make(NOWHERE, **arguments).partner is None
