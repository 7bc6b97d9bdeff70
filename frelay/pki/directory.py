"""The directory in which ``frelay ca`` keeps an authority: ``ca.pem``, ``ca.key`` and ``crl.pem``.

There is nothing else: no register of what was issued, no counter, no lock file. The next command needs to know who is
revoked and the number of the CRL, and both are in ``crl.pem`` itself.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from frelay.errors import CertificateError
from frelay.pki.authority import Algorithm, Authority, Issued
from frelay.pki.files import (
    PemFile,
    crl_file,
    crl_number,
    git_ignore,
    make_directory,
    read_certificates,
    read_crl,
    read_file,
    write_crl,
    write_together,
)

__all__ = ["AuthorityDirectory", "Revocation", "Revoked"]

# How long a list is valid if no earlier list says it: as long as those that `frelay init` writes.
_CRL_DAYS: Final = 3650
_SERIAL: Final = re.compile(r"(?:0[xX])?([0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2})+|[0-9A-Fa-f]+)\Z")
# It excludes paths, hidden files, and the names of the authority's own files.
_FILE_NAME: Final = re.compile(r"(?!ca\Z|crl\Z)[A-Za-z0-9_][A-Za-z0-9._-]*\Z")


@dataclass(frozen=True, slots=True)
class Revoked:
    """A certificate that is on the list now. ``before`` is the date of an earlier revocation, if there was one."""

    serial: int
    certificate: x509.Certificate | None
    before: datetime | None


@dataclass(frozen=True, slots=True)
class Revocation:
    """A new list, and the certificates that were given to be revoked."""

    path: Path
    number: int
    next_update: datetime
    entries: int
    asked: tuple[Revoked, ...]


@dataclass(frozen=True, slots=True)
class AuthorityDirectory:
    """The directory of one authority."""

    path: Path

    @classmethod
    def find(cls, path: Path | None) -> AuthorityDirectory:
        """The directory ``path``; or, if that is None, the current one or its ``certs``. Raises CertificateError."""
        tried = [Path(), Path("certs")] if path is None else [path]
        for one in tried:
            if os.path.lexists(one / "ca.pem"):
                return cls(one)
        names = " and no ".join(str(one / "ca.pem") for one in tried)
        raise CertificateError(
            f"no authority: there is no {names}; say where it is with --ca DIR, or make one with 'frelay ca init DIR'"
        )

    @property
    def certificate(self) -> Path:
        """The authority's certificate, which is public."""
        return self.path / "ca.pem"

    @property
    def key(self) -> Path:
        """Its key, which is secret."""
        return self.path / "ca.key"

    @property
    def crl(self) -> Path:
        """Its revocation list."""
        return self.path / "crl.pem"

    def create(self, common_name: str, *, days: int, algorithm: Algorithm, force: bool = False) -> list[Path]:
        """Make a new authority with an empty list; the directory is made if it is missing.

        The list is valid as long as the authority. Returns the files written; raises CertificateError.
        """
        authority = Authority.create(common_name, days=days, algorithm=algorithm)
        crl = authority.revocation_list(number=1, days=days)
        files = [*authority.files(self.certificate, self.key), crl_file(self.crl, crl)]
        return _write(self.path, files, force=force)

    def load(self) -> Authority:
        """The authority with its key; raises CertificateError."""
        return Authority.load(self.certificate, self.key)

    def keep(self, issued: Issued, name: str, *, directory: Path | None = None, force: bool = False) -> list[Path]:
        """Write NAME.pem and NAME.key into ``directory``, by default this one; raises CertificateError."""
        if _FILE_NAME.match(name) is None:
            raise CertificateError(
                f"{name!r} cannot name the files: write letters, digits, '.', '-' and '_', and neither 'ca' nor 'crl', "
                "which are the authority's own"
            )
        where = self.path if directory is None else directory
        return _write(where, issued.files(where / f"{name}.pem", where / f"{name}.key"), force=force)

    def revoke(self, given: Sequence[str], *, days: int | None = None, is_new: bool = False) -> Revocation:
        """Sign and write the next list: what the last one has, and ``given``, each a file of a certificate or a serial.

        ``days`` is how long it is valid, by default as long as the last one was. With ``is_new`` a list is begun if
        there is none. Raises CertificateError; then nothing was changed.
        """
        authority = self.load()
        asked = [_find(one, authority) for one in given]
        # Without the lock two commands could extend the same list, and the later one would lose what the other revoked.
        with _locked(self.path):
            previous = None if is_new and not os.path.lexists(self.crl) else self._last_crl()
            if previous is None:
                # A lost list may have been counted up from 1. This number is higher, since verifiers keep the highest.
                now = datetime.now(UTC).replace(microsecond=0)
                crl = authority.revocation_list(
                    {serial: now for serial, _ in asked}.items(), number=int(now.timestamp()), days=days or _CRL_DAYS
                )
            else:
                crl = authority.revoke(
                    previous, [serial for serial, _ in asked], days=_days_of(previous) if days is None else days
                )
            write_crl(self.crl, crl)
        before = {} if previous is None else {one.serial_number: one.revocation_date_utc for one in previous}
        return Revocation(
            path=self.crl,
            number=crl_number(crl),
            next_update=crl.next_update_utc or datetime.now(UTC),
            entries=len(crl),
            asked=tuple(Revoked(serial, one, before.get(serial)) for serial, one in dict(asked).items()),
        )

    def _last_crl(self) -> x509.CertificateRevocationList:
        if not os.path.lexists(self.crl):
            raise CertificateError(
                f"{self.crl}: there is no list to extend; put the last one there, or begin one with --new "
                "(then what was revoked before is let in again)"
            )
        if read_file(self.crl).count(b"-----BEGIN X509 CRL-----") > 1:
            raise CertificateError(
                f"{self.crl}: holds several lists, but only that of this authority can be renewed; keep it in a file "
                "of its own, and join the lists in the file that the relay reads"
            )
        return read_crl(self.crl)


def _write(directory: Path, files: Sequence[PemFile], *, force: bool) -> list[Path]:
    with ExitStack() as undo:
        # Only for its owner, since it holds keys.
        make_directory(directory, 0o700, undo)
        written = write_together([*files, *git_ignore(directory)], force=force)
        undo.pop_all()
    return written[: len(files)]


def _find(given: str, authority: Authority) -> tuple[int, x509.Certificate | None]:
    """The serial number of ``given``, and the certificate if ``given`` is a file."""
    path = Path(given)
    if not given or not os.path.lexists(path):
        number = _SERIAL.match(given)
        if number is None:
            raise CertificateError(
                f"{given!r}: there is no such file, and it is no serial number in hex; give one of them"
            )
        return int(number[1].replace(":", ""), 16), None
    certificate = read_certificates(path)[0]
    if certificate == authority.certificate:
        raise CertificateError(
            f"{path}: is the authority itself, which no list of its own can revoke; take it out of tls.client_ca"
        )
    try:
        certificate.verify_directly_issued_by(authority.certificate)
    except (ValueError, TypeError, InvalidSignature):
        raise CertificateError(
            f"{path}: was not issued by this authority; revoke it with the one that issued it (see 'frelay ca show')"
        ) from None
    return certificate.serial_number, certificate


def _days_of(crl: x509.CertificateRevocationList) -> int:
    if crl.next_update_utc is None:
        return _CRL_DAYS
    # Rounded, since a list begins a few minutes before it was signed; at least one day.
    return max(1, round((crl.next_update_utc - crl.last_update_utc).total_seconds() / 86400))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock the directory against other commands; the lock ends with the process, even if that is killed."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
