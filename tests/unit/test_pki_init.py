"""``frelay init DIR`` writes all that a first relay needs, or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import ssl
import stat
import subprocess
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from frelay.config.load import load
from frelay.errors import CertificateError
from frelay.pki.authority import Authority
from frelay.pki.files import crl_number, read_certificates, read_crl
from frelay.pki.init import initialise, summary
from frelay.protocol.identity import match, parse_selector
from frelay.tls.identity import identities
from frelay.tls.loading import load_outer_tls

NAMES = [
    "certs/ca.pem",
    "certs/ca.key",
    "certs/relay.pem",
    "certs/relay.key",
    "certs/func1.pem",
    "certs/func1.key",
    "certs/func2.pem",
    "certs/func2.key",
    "certs/crl.pem",
    ".gitignore",
    "relay.toml",
]
# An existing .gitignore, perhaps of the user, stays.
MUST_BE_NEW = [name for name in NAMES if name != ".gitignore"]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def snapshot(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def test_it_writes_these_files_and_no_others(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "demo"
    written = initialise(target)
    assert [str(path.relative_to(target)) for path in written] == NAMES
    assert sorted(snapshot(target)) == sorted(["certs", *NAMES])


def test_keys_and_their_directory_are_for_the_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        initialise(tmp_path / "demo")
    finally:
        os.umask(before)
    certs = tmp_path / "demo" / "certs"
    assert mode(certs) == 0o700
    assert {path.name: mode(path) for path in certs.glob("*.key")} == dict.fromkeys(
        ["ca.key", "relay.key", "func1.key", "func2.key"], 0o600
    )


def test_the_route_file_runs_with_what_lies_beside_it(tmp_path: Path) -> None:
    """Each of its paths is a file, and each party of the route has one of the certificates."""
    initialise(tmp_path)
    config: dict[str, Any] = tomllib.loads((tmp_path / "relay.toml").read_text())
    assert set(config) == {"relay", "tls", "admin", "route"}
    assert set(config["tls"]) == {"certificate", "private_key", "client_ca", "crl"}
    for path in config["tls"].values():
        assert (tmp_path / path).is_file()
    (route,) = config["route"]
    assert (route["name"], route["listen"]) == ("demo", "127.0.0.1:9001")
    for party in ("func1", "func2"):
        (leaf,) = read_certificates(tmp_path / f"certs/{party}.pem")
        for side in ("func1", "func2"):
            found = match([parse_selector(route[side])], identities(leaf).names)
            assert (found is not None) == (side == party)


def test_the_relay_takes_all_of_it(tmp_path: Path) -> None:
    """No key of the route file is unknown, and the certificates pass every check that ``frelay run`` makes."""
    initialise(tmp_path)
    config = load(tmp_path / "relay.toml")
    assert [route.name for route in config.routes] == ["demo"]
    assert config.tls is not None
    assert load_outer_tls(config.tls, source=tmp_path / "relay.toml").subject == "CN=relay.demo"


def test_the_relay_has_every_name_that_it_may_be_called_by(tmp_path: Path) -> None:
    initialise(tmp_path, host_name="Box-1.Example")
    (relay,) = read_certificates(tmp_path / "certs/relay.pem")
    san = relay.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.DNSName) == ["relay.demo", "localhost", "box-1.example"]
    assert [str(one) for one in san.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


@pytest.mark.parametrize("host_name", ["", "localhost", "B\u00fcro", "a b", "x.", "10.1.2.3", "h" * 64])
def test_a_machine_may_be_called_anything(tmp_path: Path, host_name: str) -> None:
    initialise(tmp_path, host_name=host_name)
    (relay,) = read_certificates(tmp_path / "certs/relay.pem")
    san = relay.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.DNSName) == ["relay.demo", "localhost"]


def test_the_crl_is_empty_and_lasts_as_long_as_the_authority(tmp_path: Path) -> None:
    initialise(tmp_path)
    crl = read_crl(tmp_path / "certs/crl.pem")
    (ca,) = read_certificates(tmp_path / "certs/ca.pem")
    assert (len(crl), crl_number(crl)) == (0, 1)
    assert crl.next_update_utc is not None
    assert crl.next_update_utc > datetime.now(UTC) + timedelta(days=3600)
    assert crl.next_update_utc <= ca.not_valid_after_utc


def test_the_authority_can_be_loaded_to_issue_and_to_revoke(tmp_path: Path) -> None:
    initialise(tmp_path)
    authority = Authority.load(tmp_path / "certs/ca.pem", tmp_path / "certs/ca.key")
    third = authority.issue(common_name="func3", dns=["func3.demo"], usage="party")
    crl = authority.revoke(read_crl(tmp_path / "certs/crl.pem"), [third.certificate.serial_number], days=30)
    assert crl_number(crl) == 2


@pytest.mark.parametrize("algorithm", ["p256", "ed25519"])
def test_relay_and_parties_verify_each_other(tmp_path: Path, algorithm: Any) -> None:
    """Outer TLS (party to relay) and inner TLS (func1 to func2), TLS 1.3, with the CRL."""
    initialise(tmp_path, algorithm=algorithm)
    certs = tmp_path / "certs"

    def context(who: str, side: int) -> ssl.SSLContext:
        made = ssl.SSLContext(side)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.load_verify_locations(certs / "ca.pem")
        made.load_verify_locations(certs / "crl.pem")
        made.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF | ssl.VerifyFlags.VERIFY_X509_STRICT
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_cert_chain(certs / f"{who}.pem", certs / f"{who}.key")
        return made

    def shake(client: str, server: str, name: str) -> None:
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        near = context(client, ssl.PROTOCOL_TLS_CLIENT).wrap_bio(down, up, server_hostname=name)
        far = context(server, ssl.PROTOCOL_TLS_SERVER).wrap_bio(up, down, server_side=True)
        waiting = {near, far}
        for _ in range(6):
            for side in list(waiting):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                waiting.discard(side)
        assert not waiting

    shake("func1", "relay", "relay.demo")
    shake("func2", "relay", "127.0.0.1")
    shake("func1", "func2", "func2.demo")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake("relay", "relay", "localhost")  # a relay is no party


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
@pytest.mark.parametrize(
    ("purpose", "name", "fits"),
    [
        ("sslserver", "relay", True),
        ("sslclient", "relay", False),
        ("sslclient", "func1", True),
        ("sslserver", "func1", True),
        ("sslclient", "func2", True),
        ("sslserver", "func2", True),
    ],
)
def test_openssl_verifies_what_init_writes(tmp_path: Path, purpose: str, name: str, *, fits: bool) -> None:
    initialise(tmp_path)
    command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.pem"]
    command += ["-crl_check", "-CRLfile", "crl.pem", f"{name}.pem"]
    done = subprocess.run(command, cwd=tmp_path / "certs", capture_output=True, text=True)
    assert (done.returncode == 0) == fits, done.stderr


# --- refusing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUST_BE_NEW)
def test_it_overwrites_nothing_and_writes_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"precious")
    before = snapshot(tmp_path)
    with pytest.raises(CertificateError, match=rf"{name}: already there, and nothing was written.*--force"):
        initialise(tmp_path)
    assert snapshot(tmp_path) == before


def test_every_file_in_the_way_is_named(tmp_path: Path) -> None:
    initialise(tmp_path)
    with pytest.raises(CertificateError) as caught:
        initialise(tmp_path)
    for name in MUST_BE_NEW:
        assert str(tmp_path / name) in str(caught.value)


def test_force_writes_a_whole_new_set(tmp_path: Path) -> None:
    initialise(tmp_path)
    (tmp_path / "certs/notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    initialise(tmp_path, force=True)
    after = snapshot(tmp_path)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == set(NAMES) - {"relay.toml", ".gitignore"}
    assert set(after) == set(before)
    # relay.toml is overwritten too: the changes of a user would be lost, hence --force.


@pytest.mark.parametrize("name", ["relay.toml", "certs/func2.key"])
@pytest.mark.parametrize("made_before", [False, True])
def test_a_failure_half_way_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, *, made_before: bool
) -> None:
    """TESTPLAN 52, for init: files and directories are as they were, with and without --force."""
    target = tmp_path / "new" / "demo"
    if made_before:
        initialise(target)
    before = snapshot(tmp_path)
    for call in ("link", "replace"):
        real = getattr(os, call)

        def failing(source: Path, path: Path, *, real: Any = real, **more: Any) -> None:
            if path == target / name and str(source).endswith(".new"):
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            real(source, path, **more)

        monkeypatch.setattr(os, call, failing)
    with pytest.raises(CertificateError, match=rf"{name}: cannot be written \(Disk quota exceeded\)"):
        initialise(target, force=made_before)
    assert snapshot(tmp_path) == before


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(CertificateError, match=r"demo/certs: cannot be made .*choose another directory"):
        initialise(tmp_path / "demo")
    assert snapshot(tmp_path) == {"demo": b"a file"}


# --- what to tell -----------------------------------------------------------------------------------------------


def test_the_summary_names_every_file_and_the_next_step(tmp_path: Path) -> None:
    target = tmp_path / "my demo"
    lines = summary(initialise(target)).splitlines()
    assert lines[0] == f"wrote 11 files in {target}:"
    assert [line.split()[0] for line in lines[1:12]] == NAMES
    assert all(len(line.split()) > 1 for line in lines[1:12])
    assert lines[-1] == f"next: frelay run -c '{target}/relay.toml'"


@pytest.mark.parametrize("length", [60, 200])
def test_a_directory_too_deep_for_a_socket_has_no_admin_section(tmp_path: Path, length: int) -> None:
    """The path of a Unix socket has at most 107 bytes. The route file still works, and says why it has no [admin]."""
    directory = tmp_path
    while len(str(directory)) < length:
        directory = directory / "a-long-name"
    directory.mkdir(parents=True, exist_ok=True)
    initialise(directory)
    fits = len(str(directory / "frelay.sock")) <= 107
    assert ("admin" in tomllib.loads((directory / "relay.toml").read_text())) is fits
    assert load(directory / "relay.toml").admin is not None or not fits
    assert fits is (length == 60)
