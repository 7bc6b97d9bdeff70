"""An authority in a directory, as ``frelay ca`` keeps it: ``ca.pem``, ``ca.key`` and ``crl.pem``.

Nothing else is kept: no register of what was issued, no counter, no lock file. What must go on from one command to the
next, who is revoked and the CRL's number, is in ``crl.pem`` itself.
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

# Where no list says how long a list is good for: as long as the ones that `frelay init` writes.
_CRL_DAYS: Final = 3650
_SERIAL: Final = re.compile(r"(?:0[xX])?([0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2})+|[0-9A-Fa-f]+)\Z")
# One that ends in a slash of another directory, hides itself, or would take the place of the authority.
_FILE_NAME: Final = re.compile(r"(?!ca\Z|crl\Z)[A-Za-z0-9_][A-Za-z0-9._-]*\Z")


@dataclass(frozen=True, slots=True)
class Revoked:
    """A certificate that is on the list now: who it was, if its file was given, and since when if not since now."""

    serial: int
    certificate: x509.Certificate | None
    before: datetime | None


@dataclass(frozen=True, slots=True)
class Revocation:
    """What a new list says of those that it was asked about, and of itself."""

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
        """The directory ``path``, or if it is None this one or its ``certs``; raises CertificateError."""
        tried = [Path(), Path("certs")] if path is None else [path]
        for one in tried:
            if os.path.lexists(one / "ca.pem"):
                return cls(one)
        places = " and ".join(str(one / "ca.pem") for one in tried)
        raise CertificateError(
            f"no authority: there is no {places}; say where it is with --ca DIR, or make one with 'frelay ca init DIR'"
        )

    @property
    def certificate(self) -> Path:
        """The authority's certificate, which everybody may have."""
        return self.path / "ca.pem"

    @property
    def key(self) -> Path:
        """Its key, which nobody may have."""
        return self.path / "ca.key"

    @property
    def crl(self) -> Path:
        """The list of what it revoked."""
        return self.path / "crl.pem"

    def create(self, common_name: str, *, days: int, algorithm: Algorithm, force: bool = False) -> list[Path]:
        """Make a new authority with an empty list; the directory is made if it is missing.

        The list is good for as long as the authority. Returns the files written; raises CertificateError.
        """
        authority = Authority.create(common_name, days=days, algorithm=algorithm)
        crl = authority.revocation_list(number=1, days=days)
        files = [*authority.files(self.certificate, self.key), crl_file(self.crl, crl)]
        return _write(self.path, files, force=force)

    def load(self) -> Authority:
        """The authority, key and all; raises CertificateError."""
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
        """Sign and write the next list: all that the last one has, and ``given``, each a certificate's file or serial.

        ``days`` is how long it is good for, by default as long as the last one was. With ``is_new`` a list is begun
        where there is none. Raises CertificateError; nothing was changed then.
        """
        authority = self.load()
        asked = [_find(one, authority) for one in given]
        # Two commands at one time would each extend the same list, and the later one drop what the other revoked.
        with _locked(self.path):
            previous = None if is_new and not os.path.lexists(self.crl) else self._last_crl()
            if previous is None:
                # Above the number of whatever was counted up from 1 before, since verifiers keep the higher one.
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
                f"{self.crl}: there is no list to go on from; put the last one there, or begin one with --new "
                "(then what was revoked before is let in again)"
            )
        if read_file(self.crl).count(b"-----BEGIN X509 CRL-----") > 1:
            raise CertificateError(
                f"{self.crl}: holds several lists, and only this authority's can be renewed; keep that in a file of "
                "its own, and join them where the relay reads them"
            )
        return read_crl(self.crl)


def _write(directory: Path, files: Sequence[PemFile], *, force: bool) -> list[Path]:
    with ExitStack() as undo:
        # Nobody else's business, since keys are in it.
        make_directory(directory, 0o700, undo)
        written = write_together([*files, *git_ignore(directory)], force=force)
        undo.pop_all()
    return written[: len(files)]


def _find(given: str, authority: Authority) -> tuple[int, x509.Certificate | None]:
    """The serial that ``given`` means, and the certificate where it is a file."""
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
    # Rounded up: it began a few minutes before it was signed, and one day is the least that there is.
    return max(1, round((crl.next_update_utc - crl.last_update_utc).total_seconds() / 86400))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Be the only one here for a moment; the lock goes with the process, whatever becomes of it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
