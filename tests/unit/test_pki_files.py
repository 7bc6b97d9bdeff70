"""Files are written together or not at all, keys are secret at once, and errors name the file and the remedy."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from frelay.errors import CertificateError
from frelay.pki.authority import Authority
from frelay.pki.files import (
    PemFile,
    crl_number,
    read_certificates,
    read_crl,
    read_private_key,
    write_crl,
    write_together,
)
from support.certs import TestAuthority


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of ``directory``, the hidden ones too: nothing temporary may be left."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def trio_of(directory: Path, text: bytes = b"new ") -> list[PemFile]:
    return [PemFile(directory / name, text + name.encode(), secret=name == "b") for name in "abc"]


# --- writing ----------------------------------------------------------------------------------------------------


def test_all_are_written_with_their_modes(tmp_path: Path, no_umask: None) -> None:
    assert write_together(trio_of(tmp_path)) == [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    assert contents(tmp_path) == {"a": b"new a", "b": b"new b", "c": b"new c"}
    assert [mode(tmp_path / name) for name in "abc"] == [0o644, 0o600, 0o644]


def test_a_key_is_never_readable_by_others_not_even_before_it_has_its_name(
    tmp_path: Path, no_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[tuple[int, int]] = []
    real_open = os.open

    def watch(path: Path, flags: int, permissions: int = 0o777) -> int:
        descriptor = real_open(path, flags, permissions)
        if flags & os.O_CREAT:
            created.append((flags, stat.S_IMODE(os.fstat(descriptor).st_mode)))
        return descriptor

    monkeypatch.setattr(os, "open", watch)
    write_together([PemFile(tmp_path / "key", b"secret", secret=True)])
    ((flags, permissions),) = created
    assert flags & os.O_EXCL
    assert permissions == 0o600


def test_what_exists_is_refused_by_name_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"old")
    (tmp_path / "c").symlink_to("nowhere")
    with pytest.raises(CertificateError, match=r"/b, .*/c: already there, and nothing was written.*--force"):
        write_together(trio_of(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    assert (tmp_path / "b").read_bytes() == b"old"


def test_force_replaces_and_gives_the_mode_anew(tmp_path: Path, no_umask: None) -> None:
    (tmp_path / "b").write_bytes(b"old")
    (tmp_path / "b").chmod(0o666)
    write_together(trio_of(tmp_path), force=True)
    assert contents(tmp_path) == {"a": b"new a", "b": b"new b", "c": b"new c"}
    assert mode(tmp_path / "b") == 0o600


def test_a_symbolic_link_is_replaced_never_written_through(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(b"untouched")
    (tmp_path / "b").symlink_to(target)
    write_together(trio_of(tmp_path), force=True)
    assert target.read_bytes() == b"untouched"
    assert not (tmp_path / "b").is_symlink()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("linkable", [True, False], ids=["hard links", "no hard links"])
@pytest.mark.parametrize("failing", ["a", "b", "c"])
def test_a_failure_in_the_middle_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, *, force: bool, linkable: bool
) -> None:
    """TESTPLAN 52, for certificates."""
    if force:
        for name in "abc":
            (tmp_path / name).write_bytes(b"old " + name.encode())
    before = contents(tmp_path)

    def fail_at(real: Callable[..., None]) -> Callable[..., None]:
        def wrapped(source: Path, target: Path, **more: bool) -> None:
            if Path(target).name == failing and str(source).endswith(".new"):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(source, target, **more)

        return wrapped

    if not linkable:
        monkeypatch.setattr(os, "link", refuse_to_link)
    else:
        monkeypatch.setattr(os, "link", fail_at(os.link))
    monkeypatch.setattr(os, "rename", fail_at(os.rename))
    monkeypatch.setattr(os, "replace", fail_at(os.replace))
    with pytest.raises(CertificateError, match=rf"/{failing}: cannot be written \(No space.*nothing was changed"):
        write_together(trio_of(tmp_path), force=force)
    assert contents(tmp_path) == before


def refuse_to_link(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("force", [False, True])
def test_a_file_system_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, force: bool
) -> None:
    monkeypatch.setattr(os, "link", refuse_to_link)
    if force:
        (tmp_path / "b").write_bytes(b"old")
    write_together(trio_of(tmp_path), force=force)
    assert contents(tmp_path) == {"a": b"new a", "b": b"new b", "c": b"new c"}


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CertificateError, match=r"/a: cannot be written .*free some space"):
        write_together(trio_of(tmp_path))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("linkable", [True, False], ids=["hard links", "no hard links"])
def test_a_file_that_appears_meanwhile_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, linkable: bool
) -> None:
    real = os.link

    def somebody_was_faster(source: Path, target: Path) -> None:
        if target.name == "b":
            target.write_bytes(b"theirs")
        if not linkable:
            refuse_to_link()
        real(source, target)

    monkeypatch.setattr(os, "link", somebody_was_faster)
    with pytest.raises(CertificateError, match=r"/b: .*--force"):
        write_together(trio_of(tmp_path))
    assert contents(tmp_path) == {"b": b"theirs"}


def test_a_directory_in_the_way_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(CertificateError, match=r"/b: is not a regular file"):
        write_together(trio_of(tmp_path), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"nowhere/a: cannot be written .*make the directory .*nowhere first"):
        write_together(trio_of(tmp_path / "nowhere"))


def test_one_name_for_two_files_is_refused(tmp_path: Path) -> None:
    both = [PemFile(tmp_path / "x", b"certificate"), PemFile(tmp_path / "." / "x", b"key", secret=True)]
    with pytest.raises(CertificateError, match="named twice"):
        write_together(both, force=True)
    assert contents(tmp_path) == {}


def test_a_key_is_not_in_the_repr() -> None:
    assert "hush" not in repr(PemFile(Path("x"), b"hush", secret=True))


# --- CRLs -------------------------------------------------------------------------------------------------------


def test_a_crl_goes_forward_only(tmp_path: Path) -> None:
    """An older list would let in again what the newer one revoked."""
    authority, path = Authority.create("x"), tmp_path / "crl.pem"
    write_crl(path, authority.revocation_list(number=7, days=1))
    for number in (7, 6):
        with pytest.raises(CertificateError, match=rf"crl.pem: holds CRL number 7, .*number {number};.*--force"):
            write_crl(path, authority.revocation_list(number=number, days=1))
    write_crl(path, authority.revocation_list(number=8, days=1))
    assert crl_number(read_crl(path)) == 8
    write_crl(path, authority.revocation_list(number=1, days=1), force=True)
    assert crl_number(read_crl(path)) == 1


def test_a_crl_of_another_authority_is_not_replaced(tmp_path: Path) -> None:
    path = write_crl(tmp_path / "crl.pem", Authority.create("one").revocation_list(number=1, days=1))
    with pytest.raises(CertificateError, match=r"crl.pem: holds the CRL of another authority \(CN=one\)"):
        write_crl(path, Authority.create("two").revocation_list(number=2, days=1))


# --- reading ----------------------------------------------------------------------------------------------------


READERS: list[Callable[[Path], object]] = [read_certificates, read_crl, read_private_key]


@pytest.mark.parametrize("read", READERS)
def test_a_missing_file_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(CertificateError, match=r"/missing.pem: cannot be read \(No such file"):
        read(tmp_path / "missing.pem")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0\xff" * 99, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_garbage_is_told_from_pem(tmp_path: Path, read: Callable[[Path], object], content: bytes) -> None:
    path = tmp_path / "x.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(CertificateError, match=r"/x.pem: no readable .* PEM"):
        read(path)


@pytest.mark.parametrize("read", READERS)
def test_a_fifo_does_not_stop_the_program(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(CertificateError, match="is not a regular file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("read", READERS)
def test_a_directory_is_no_file(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(CertificateError, match=r"is not a regular file|Is a directory"):
        read(tmp_path)


def test_a_huge_file_is_not_swallowed(tmp_path: Path) -> None:
    with open(tmp_path / "huge", "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(CertificateError, match="larger than 16 MiB"):
        read_certificates(tmp_path / "huge")


@pytest.mark.parametrize("permissions", [0o644, 0o604, 0o620, 0o777])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, permissions: int) -> None:
    _, path = TestAuthority().party().write(tmp_path)
    assert isinstance(read_private_key(path), ec.EllipticCurvePrivateKey)
    path.chmod(permissions)
    with pytest.raises(CertificateError, match=rf"party.key: has mode {permissions:04o}, others .*chmod 600"):
        read_private_key(path)


def test_a_key_with_a_password_is_named_as_that(tmp_path: Path) -> None:
    path = tmp_path / "x.key"
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    path.chmod(0o600)
    with pytest.raises(CertificateError, match=r"x.key: the key has a password.*openssl pkey"):
        read_private_key(path)


def test_a_chain_is_read_in_order(tmp_path: Path) -> None:
    party = TestAuthority.root_for_intermediates().intermediate().party(dns=["func1.demo"])
    path, _ = party.write(tmp_path)
    assert tuple(read_certificates(path)) == party.chain
