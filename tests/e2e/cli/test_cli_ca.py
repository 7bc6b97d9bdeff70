"""``frelay ca``: an authority, certificates for a relay and two functions, and revocation lists that grow."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from frelay.pki.files import crl_number, read_certificates, read_crl
from support.certs import TestAuthority
from support.commands import frelay_command
from support.site import DEMO, Site
from support.tools import tool


def run(tmp_path: Path, *arguments: str) -> str:
    """Run ``frelay ca``, which must succeed; returns its stdout."""
    said = frelay_command("ca", *arguments, cwd=tmp_path)
    assert said.code == 0, said.stderr
    return said.stdout


def usages(path: Path) -> set[x509.ObjectIdentifier]:
    return set(read_certificates(path)[0].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


async def test_what_it_makes_is_enough_for_two_functions_to_meet(tmp_path: Path) -> None:
    run(tmp_path, "init", "ca", "--name", "acme CA")
    run(tmp_path, "relay", "--ca", "ca", "--dns", "localhost", "--ip", "127.0.0.1")
    run(tmp_path, "party", "func1", "--ca", "ca", "--dns", "func1.demo")
    run(tmp_path, "party", "func2", "--ca", "ca", "--uri", "spiffe://acme/jobs/func2", "--algorithm", "ed25519")
    site = Site(tmp_path)
    home = tmp_path / "ca"
    site.ca_path = home / "ca.pem"
    site.paths = {name: (home / f"{name}.pem", home / f"{name}.key") for name in ("func1", "func2")}
    routes = DEMO.replace("dns:func2.demo", "uri:spiffe://acme/jobs/*")
    site.config.write_text(
        '[tls]\ncertificate = "ca/relay.pem"\nprivate_key = "ca/relay.key"\n'
        f'client_ca = "ca/ca.pem"\ncrl = "ca/crl.pem"\n{routes}'
    )
    site.write = lambda *_, **__: site.config  # type: ignore[method-assign]
    async with site.relay() as relay:
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await one.join()
        await one.expect("WAITING")
        await two.join()
        await two.expect("WAITING")
        assert (await one.expect("PAIRED"))["peer"] == "uri:spiffe://acme/jobs/func2"
        one.close()
        run(tmp_path, "revoke", "--ca", "ca", "ca/func1.pem")
        await relay.relay.reload()
        party = await site.connect(relay, "func1")
        assert await party.alert() == "SSLV3_ALERT_CERTIFICATE_REVOKED"


def test_init_says_what_is_what(tmp_path: Path) -> None:
    out = run(tmp_path, "init", "ca", "--days", "30", "--algorithm", "ed25519")
    assert [line.split()[0] for line in out.splitlines()] == ["ca/ca.pem", "ca/ca.key", "ca/crl.pem"]
    assert "CN=frelay CA, Ed25519, until " in out
    assert stat.S_IMODE((tmp_path / "ca" / "ca.key").stat().st_mode) == 0o600
    said = frelay_command("ca", "init", "ca", cwd=tmp_path)
    assert (said.code, said.stdout) == (1, "")
    assert "already there, and nothing was written" in said.messages[0]
    run(tmp_path, "init", "ca", "--force")


def test_each_certificate_is_for_what_it_is_needed_for(tmp_path: Path) -> None:
    run(tmp_path, "init", "certs")
    out = run(tmp_path, "relay", "--dns", "relay.acme", "--dns", "*.relay.acme", "--ip", "10.0.0.1", "--days", "9")
    certificate, key = out.splitlines()
    assert certificate.startswith("certs/relay.pem  relay.acme, *.relay.acme, 10.0.0.1, until ")
    assert key.startswith("certs/relay.key  its key: ")
    assert usages(tmp_path / "certs/relay.pem") == {ExtendedKeyUsageOID.SERVER_AUTH}
    run(tmp_path, "party", "func1", "--dns", "func1.acme", "--out", "for-func1")
    assert usages(tmp_path / "for-func1/func1.pem") == {
        *(ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
    }
    assert stat.S_IMODE((tmp_path / "for-func1/func1.key").stat().st_mode) == 0o600


def test_a_key_is_never_overwritten_unasked(tmp_path: Path) -> None:
    run(tmp_path, "init", "certs")
    run(tmp_path, "party", "func1", "--dns", "func1.acme")
    before = (tmp_path / "certs/func1.key").read_bytes()
    (tmp_path / "certs/func1.pem").unlink()
    said = frelay_command("ca", "party", "func1", "--dns", "func1.acme", cwd=tmp_path)
    assert said.code == 1
    assert "certs/func1.key: already there" in said.messages[0]
    assert (tmp_path / "certs/func1.key").read_bytes() == before
    run(tmp_path, "party", "func1", "--dns", "func1.acme", "--force")
    assert (tmp_path / "certs/func1.key").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["relay"], "a relay needs a name or an address"),
        (["relay", "--uri", "spiffe://acme/relay"], "a relay needs a name or an address"),
        (["party", "func1"], "a party needs a name that a route can match"),
        (["party", "func1", "--ip", "10.0.0.1"], "a party needs a name that a route can match"),
        (["party"], "Missing argument 'NAME'"),
        (["party", "x", "--dns", "x.acme", "--days", "0"], "Invalid value for '--days'"),
        (["party", "x", "--dns", "x.acme", "--algorithm", "rsa"], "write p256 or ed25519"),
        (["init"], "Missing argument 'DIR'"),
        (["init", "x", "--algorithm", "dsa"], "write p256 or ed25519"),
        (["revoke", "--renew", "ab"], "--renew revokes nobody"),
        (["show"], "Missing argument 'FILE...'"),
        (["burn"], "No such command 'burn'"),
    ],
)
def test_a_wrong_call(tmp_path: Path, arguments: list[str], text: str) -> None:
    said = frelay_command("ca", *arguments, cwd=tmp_path)
    assert (said.code, said.stdout) == (2, "")
    assert text in said.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["party", "x", "--dns", "x_.acme."], "no selector could ever match it"),
        (["party", "ca", "--dns", "x.acme", "--force"], "cannot name the files"),
        (["party", "x", "--dns", "x.acme", "--days", "9999"], "longer than the authority is valid"),
        (["party", "x", "--dns", "x.acme", "--ca", "nowhere"], "there is no nowhere/ca.pem"),
        (["revoke", "no-such.pem"], "'no-such.pem': there is no such file"),
        (["show", "no-such.pem"], "no-such.pem: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_told_with_its_remedy(tmp_path: Path, arguments: list[str], text: str) -> None:
    run(tmp_path, "init", "certs")
    said = frelay_command("ca", *arguments, cwd=tmp_path)
    assert (said.code, said.stdout) == (1, "")
    (message,) = said.messages
    assert message.startswith("frelay: ")
    assert text in message


# --- revoke ----------------------------------------------------------------------------------------------------------


def test_revoke_says_whom_and_since_when(tmp_path: Path) -> None:
    run(tmp_path, "init", "certs")
    run(tmp_path, "party", "func1", "--dns", "func1.acme")
    serial = f"{read_certificates(tmp_path / 'certs/func1.pem')[0].serial_number:x}"
    first, second = run(tmp_path, "revoke", "certs/func1.pem").splitlines()
    assert first == f"revoked {serial} CN=func1"
    assert second.startswith("certs/crl.pem: number 2, 1 revoked, good until ")
    again, other, last = run(tmp_path, "revoke", serial, "ab:cd", "--days", "3").splitlines()
    assert again.startswith(f"revoked {serial} already, since ")
    assert other == "revoked abcd"
    assert last.startswith("certs/crl.pem: number 3, 2 revoked, good until ")
    for arguments in (["revoke"], ["revoke", "--renew"]):
        assert run(tmp_path, *arguments).splitlines()[0] == "revoked nobody"
    assert crl_number(read_crl(tmp_path / "certs/crl.pem")) == 5


def test_a_certificate_of_another_authority_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, "init", "certs")
    path, _ = TestAuthority.root_for_intermediates("\x1b[2J").party(dns=["func1.acme"]).write(tmp_path)
    said = frelay_command("ca", "revoke", path, cwd=tmp_path)
    assert (said.code, said.stdout) == (1, "")
    assert "was not issued by this authority" in said.messages[0]
    assert "\x1b" not in said.stderr


def test_openssl_agrees_about_the_list(tmp_path: Path) -> None:
    run(tmp_path, "init", "certs")
    for name in ("func1", "func2"):
        run(tmp_path, "party", name, "--dns", f"{name}.acme")
    run(tmp_path, "revoke", "certs/func1.pem")
    command = [
        tool("openssl"),
        "verify",
        "-crl_check",
        "-x509_strict",
        "-CAfile",
        "certs/ca.pem",
        "-CRLfile",
        "certs/crl.pem",
    ]
    for name, text in (("func1", "certificate revoked"), ("func2", "func2.pem: OK")):
        done = subprocess.run(
            [*command, f"certs/{name}.pem"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert text in done.stdout + done.stderr


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_of_all_that_there_is(tmp_path: Path) -> None:
    run(tmp_path, "init", "certs")
    run(tmp_path, "party", "func1", "--dns", "func1.acme", "--days", "10")
    run(tmp_path, "revoke", "ab")
    out = run(tmp_path, "show", "certs/func1.pem", "certs/func1.key", "certs/crl.pem")
    lines = out.splitlines()
    assert lines[0] == "certs/func1.pem"
    assert "  names        dns:func1.acme" in lines
    assert any(line.startswith("               spki:sha256:") for line in lines)
    assert "  usages       clientAuth, serverAuth; digitalSignature" in lines
    assert "expires in 9 days" in out
    assert "  private key  EC P-256" in lines
    assert "PRIVATE" not in out
    assert "  CRL          of CN=frelay CA" in lines
    assert any(line.startswith("  revoked      ab on ") for line in lines)


def test_show_as_json(tmp_path: Path) -> None:
    run(tmp_path, "init", "certs")
    found = json.loads(run(tmp_path, "show", "--json", "certs/ca.pem", "certs/crl.pem", "certs/ca.key"))
    assert [one["file"] for one in found["files"]] == ["certs/ca.pem", "certs/crl.pem", "certs/ca.key"]
    ((ca,), (crl,), (key,)) = (one["holds"] for one in found["files"])
    assert (ca["kind"], ca["authority"]) == ("certificate", True)
    assert (crl["kind"], crl["number"], crl["revoked"]) == ("crl", 1, [])
    assert key == {"kind": "private key", "key": "EC P-256", "encrypted": False}


def test_show_says_what_a_certificate_is_good_for(site: Site) -> None:
    config = site.write()
    site.add("cn", site.ca.cn_only("func1.demo"))
    site.add("old", site.ca.expired(dns=["func1.demo"]))
    files = [site.paths[name][0] for name in ("func1", "cn", "old")]
    said = frelay_command("ca", "show", "-c", config, *files)
    assert said.code == 0
    first, second, third = said.stdout.split("\n\n")
    assert "  fits         route demo as func1, by dns:func1.demo" in first
    assert "  refused      route: fits neither party of route demo" in second
    assert "which is never an identity" in second
    assert "EXPIRED" in third
    assert "  would fit    route demo as func1, by dns:func1.demo" in third
    assert "  remedy       issue a new one" in third
    found = json.loads(frelay_command("ca", "show", "--json", "-c", config, *files, site.ca_path).stdout)
    shown = [one["holds"][0].get("fits") for one in found["files"]]
    assert [fits and fits["admitted"] for fits in shown] == [True, False, False, None]
    assert shown[2]["refusal"]["code"] == "certificate-expired"


def test_show_goes_on_after_what_it_cannot_read(site: Site) -> None:
    said = frelay_command("ca", "show", site.ca_path, "nothing.pem", site.paths["func1"][0], cwd=site.directory)
    assert said.code == 1
    assert len(said.messages) == 1
    assert said.stdout.count("  certificate  ") == 2
    said = frelay_command("ca", "show", "-c", "nothing.toml", site.ca_path, cwd=site.directory)
    assert said.code == 1
    assert "there is no such file" in said.messages[0]
    assert said.stdout.count("  certificate  ") == 1


def test_names_cannot_move_the_cursor(site: Site) -> None:
    """TESTPLAN 54: neither on stdout nor on stderr, from any certificate or file name."""
    path, _ = site.ca.odd([x509.DNSName("\x1b[2J.demo")], common_name="\x1b[2Jx").write(site.directory)
    said = frelay_command("ca", "show", "-c", site.write(), path)
    assert said.code == 0
    assert "\x1b" not in said.stdout
    said = frelay_command("ca", "show", "\x1b[2J.pem", cwd=site.directory)
    assert said.code == 1
    assert "\x1b" not in said.stderr


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("init", ["--name", "--days", "--algorithm", "--force"]),
        ("relay", ["--ca", "--dns", "--uri", "--ip", "--days", "--algorithm", "--out", "--force"]),
        ("party", ["--ca", "--dns", "--uri", "--ip", "--days", "--algorithm", "--out", "--force"]),
        ("revoke", ["--ca", "--days", "--renew", "--new"]),
        ("show", ["--config", "--json"]),
    ],
)
def test_help_names_every_option(command: str, options: list[str]) -> None:
    said = frelay_command("ca", command, "--help", env={"COLUMNS": "100"})
    assert (said.code, said.stderr) == (0, "")
    assert all(option in said.stdout for option in options)
    assert command in frelay_command("ca", "--help").stdout
