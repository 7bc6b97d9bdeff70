"""An authority in a directory: what it writes, what it never overwrites, and that its lists only grow."""

from __future__ import annotations

import stat
import threading
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography import x509

from frelay.errors import CertificateError
from frelay.pki.authority import Authority
from frelay.pki.directory import AuthorityDirectory
from frelay.pki.files import crl_file, crl_number, read_certificates, read_crl, write_together
from support.certs import TestAuthority


@pytest.fixture
def home(tmp_path: Path) -> AuthorityDirectory:
    home = AuthorityDirectory(tmp_path / "ca")
    home.create("x", days=30, algorithm="p256")
    return home


def party(home: AuthorityDirectory, name: str = "func1") -> Path:
    issued = home.load().issue(common_name=name, dns=[f"{name}.demo"], usage="party")
    return home.keep(issued, name)[0]


def test_what_is_made(home: AuthorityDirectory) -> None:
    assert sorted(path.name for path in home.path.iterdir()) == [".gitignore", "ca.key", "ca.pem", "crl.pem"]
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(home.key.stat().st_mode) == 0o600
    crl = read_crl(home.crl)
    assert (len(crl), crl_number(crl)) == (0, 1)
    assert crl.next_update_utc == home.load().certificate.not_valid_after_utc


def test_nothing_is_overwritten(home: AuthorityDirectory) -> None:
    before = home.certificate.read_bytes()
    with pytest.raises(CertificateError, match="already there"):
        home.create("y", days=30, algorithm="p256")
    assert home.certificate.read_bytes() == before
    home.create("y", days=30, algorithm="ed25519", force=True)
    assert home.load().certificate.subject.rfc4514_string() == "CN=y"


def test_a_party_is_kept_beside_or_elsewhere(home: AuthorityDirectory, tmp_path: Path) -> None:
    assert party(home) == home.path / "func1.pem"
    issued = home.load().issue(common_name="x", usage="party")
    written = home.keep(issued, "x", directory=tmp_path / "far" / "away")
    assert [path.name for path in written] == ["x.pem", "x.key"]
    assert stat.S_IMODE(written[1].stat().st_mode) == 0o600
    with pytest.raises(CertificateError, match="already there"):
        home.keep(issued, "func1")


@pytest.mark.parametrize("name", ["ca", "crl", "../x", "a/b", ".x", "-x", "", "x\n", "x\x1b"])
def test_no_name_leaves_the_directory_or_takes_the_authoritys_place(home: AuthorityDirectory, name: str) -> None:
    issued = home.load().issue(common_name="x", usage="party")
    before = home.key.read_bytes()
    with pytest.raises(CertificateError, match="cannot name the files"):
        home.keep(issued, name, force=True)
    assert home.key.read_bytes() == before


def test_it_is_found_here_or_in_certs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CertificateError, match=r"there is no ca.pem and no certs/ca.pem; say where it is with --ca"):
        AuthorityDirectory.find(None)
    AuthorityDirectory(Path("certs")).create("x", days=3, algorithm="p256")
    assert AuthorityDirectory.find(None).certificate == Path("certs/ca.pem")
    AuthorityDirectory(Path()).create("x", days=3, algorithm="p256")
    assert AuthorityDirectory.find(None).certificate == Path("ca.pem")
    with pytest.raises(CertificateError, match=r"there is no other/ca.pem"):
        AuthorityDirectory.find(Path("other"))


# --- revoking --------------------------------------------------------------------------------------------------------


def test_a_list_grows_and_is_newer_each_time(home: AuthorityDirectory) -> None:
    lists = [read_crl(home.crl)]
    for given in ([str(party(home))], [], ["0xab:cd"], ["ABCD"]):
        done = home.revoke(given)
        lists.append(read_crl(home.crl))
        assert done.number == crl_number(lists[-1])
    assert [len(crl) for crl in lists] == [0, 1, 1, 2, 2]
    for older, newer in pairwise(lists):
        assert crl_number(newer) == crl_number(older) + 1
        assert newer.last_update_utc > older.last_update_utc
        assert {one.serial_number for one in older} <= {one.serial_number for one in newer}


@pytest.mark.parametrize("text", ["abcd", "ABCD", "0xabcd", "0XABCD", "ab:cd", "00abcd"])
def test_a_serial_is_hex_however_it_is_written(home: AuthorityDirectory, text: str) -> None:
    (one,) = home.revoke([text]).asked
    assert (one.serial, one.certificate, one.before) == (0xABCD, None, None)


def test_who_is_on_it_already_stays_since_then(home: AuthorityDirectory) -> None:
    path = party(home)
    (first,) = home.revoke([str(path)]).asked
    assert first.certificate == read_certificates(path)[0]
    (again,) = home.revoke([str(path)]).asked
    assert again.before is not None
    entry = read_crl(home.crl).get_revoked_certificate_by_serial_number(first.serial)
    assert entry is not None
    assert entry.revocation_date_utc == again.before


def test_one_named_twice_is_one(home: AuthorityDirectory) -> None:
    assert len(home.revoke(["ab", "0xab"]).asked) == 1


def test_it_is_good_as_long_as_the_last_unless_told(home: AuthorityDirectory) -> None:
    """To within a day, since the unit is days; here the authority expires first."""
    assert home.revoke([], days=7).next_update < datetime.now(UTC) + timedelta(days=8)
    assert home.revoke([]).next_update > datetime.now(UTC) + timedelta(days=6)


def test_a_certificate_of_another_authority_is_not_revoked(home: AuthorityDirectory, tmp_path: Path) -> None:
    before = home.crl.read_bytes()
    for other in (TestAuthority("other"), TestAuthority("x")):
        path, _ = other.party(dns=["func1.demo"]).write(tmp_path)
        with pytest.raises(CertificateError, match="was not issued by this authority"):
            home.revoke([str(party(home, f"f{id(other)}")), str(path)])
    assert home.crl.read_bytes() == before


def test_the_authority_cannot_revoke_itself(home: AuthorityDirectory) -> None:
    with pytest.raises(CertificateError, match="is the authority itself"):
        home.revoke([str(home.certificate)])


@pytest.mark.parametrize("text", ["no-such.pem", "", "xyz", "-1", "12 34", "a:b:c"])
def test_what_is_neither_file_nor_serial_is_told(home: AuthorityDirectory, text: str) -> None:
    with pytest.raises(CertificateError, match="no serial number in hex"):
        home.revoke([str(home.path / text) if text.endswith(".pem") else text])


@pytest.mark.parametrize("text", ["0", "f" * 41])
def test_a_serial_that_no_certificate_can_have_is_told(home: AuthorityDirectory, text: str) -> None:
    before = home.crl.read_bytes()
    with pytest.raises(CertificateError, match="serial number"):
        home.revoke([text])
    assert home.crl.read_bytes() == before


def test_a_list_that_is_gone_is_not_begun_again_by_itself(home: AuthorityDirectory) -> None:
    """All that it had revoked would be let in again."""
    home.crl.unlink()
    with pytest.raises(CertificateError, match="begin one with --new"):
        home.revoke(["ab"])
    done = home.revoke(["ab"], is_new=True)
    assert done.number > 1_000_000_000
    assert home.revoke(["cd"], is_new=True).entries == 2


def test_several_lists_in_one_file_are_left_alone(home: AuthorityDirectory) -> None:
    home.crl.write_bytes(home.crl.read_bytes() + TestAuthority("other").crl())
    with pytest.raises(CertificateError, match="holds several lists"):
        home.revoke(["ab"])


def test_a_list_of_another_authority_is_not_carried_on(home: AuthorityDirectory) -> None:
    crl = Authority.create("other").revocation_list(number=1, days=1)
    write_together([crl_file(home.crl, crl)], force=True)
    with pytest.raises(CertificateError, match="not this authority's"):
        home.revoke(["ab"])


def test_of_many_at_one_time_none_is_lost(home: AuthorityDirectory) -> None:
    threads = [threading.Thread(target=home.revoke, args=([f"{n:x}"],)) for n in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    crl: x509.CertificateRevocationList = read_crl(home.crl)
    assert {one.serial_number for one in crl} == set(range(1, 21))
    assert crl_number(crl) == 21
