"""Certificates, keys and CRLs on disk: they are written all together or not at all, and read with helpful errors.

Writing has two dangers. A key that is world-readable for a moment has leaked, so a key file is *created* with its mode.
And a certificate without its key (or the reverse) is worse than neither. So :func:`write_together` first writes and
syncs every file under a temporary name in its directory, and only then gives them their names. If a step fails, the
new files are removed and the old ones are put back: the directory is then as it was before.

A power cut between two of those renames can still leave a part of the set; but each file is whole.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from frelay.errors import CertificateError
from frelay.pki.key_mode import objection_to_mode

__all__ = [
    "PemFile",
    "certificates_pem",
    "crl_file",
    "crl_number",
    "git_ignore",
    "key_pem",
    "make_directory",
    "read_certificates",
    "read_crl",
    "read_file",
    "read_private_key",
    "write_crl",
    "write_together",
]

_MODE: Final = 0o644  # the umask still applies
_SECRET_MODE: Final = 0o600
_KEYS: Final = "*.key"
_GIT_IGNORE: Final = f"# Written by frelay: private keys belong in no repository.\n{_KEYS}\n".encode()
# A chain of RSA certificates has some 10 KiB, a CRL of 100,000 entries 4 MB. A larger file is something else.
_MAX_FILE: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PemFile:
    """A file to write; a ``secret`` one is created with mode 0600."""

    path: Path
    content: bytes = field(repr=False)
    secret: bool = False


# --- writing ----------------------------------------------------------------------------------------------------


def write_together(files: Sequence[PemFile], *, force: bool = False) -> list[Path]:
    """Write all of ``files`` or none, and return their paths in order.

    The directories must exist. A file that exists is refused unless ``force``; a directory or a device of that name
    always is.

    Raises:
        CertificateError: names the file and the remedy; nothing was changed.
    """
    paths = [file.path for file in files]
    if len({os.path.abspath(path) for path in paths}) != len(paths):
        raise CertificateError(f"{', '.join(map(str, paths))}: the same file is named twice; give each its own")
    present = [str(path) for path in paths if os.path.lexists(path)]
    if present and not force:
        raise CertificateError(
            f"{', '.join(present)}: already there, and nothing was written. "
            "Choose another place, or overwrite with --force (what the old keys certified is then lost)"
        )
    for path in paths:
        if os.path.exists(path) and not os.path.isfile(path):
            raise CertificateError(f"{path}: is not a regular file; remove it or choose another name")
    with ExitStack() as scratch, ExitStack() as undo:
        staged = [(_stage(file, scratch), file.path) for file in files]
        replaced: list[Path] = []
        for temporary, path in staged:
            try:
                _give_name(temporary, path, replaced, undo, force=force)
            except OSError as error:
                raise _cannot_write(path, error) from error
        undo.pop_all()
        for kept in replaced:
            _remove(kept)
    for directory in {path.parent for path in paths}:
        _sync_directory(directory)
    return paths


def make_directory(path: Path, mode: int, undo: ExitStack) -> None:
    """Make ``path`` and the missing directories above it; ``undo`` removes those of them that are still empty.

    Raises :class:`CertificateError`.
    """
    missing = [one for one in (path, *path.parents) if not os.path.exists(one)]
    for one in reversed(missing):
        try:
            os.mkdir(one, mode)
        except FileExistsError:
            continue
        except OSError as error:
            raise CertificateError(
                f"{one}: cannot be made ({error.strerror}), nothing was changed; choose another directory"
            ) from error
        undo.callback(_remove_directory, one)


def git_ignore(*directories: Path) -> list[PemFile]:
    """A ``.gitignore`` for keys, for :func:`write_together`. Each of ``directories`` is inside the one before it.

    It goes into the first directory that has none. A file of the user is never changed: if one ignores keys already, or
    if all directories have one, nothing is written.
    """
    for directory in directories:
        path = directory / ".gitignore"
        if not os.path.lexists(path):
            return [PemFile(path, _GIT_IGNORE)]
        if _KEYS in _lines(path):
            return []
    return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _remove_directory(path: Path) -> None:
    with suppress(OSError):  # another process put something into it meanwhile
        os.rmdir(path)


def write_crl(path: Path, crl: x509.CertificateRevocationList, *, force: bool = False) -> Path:
    """Replace the CRL at ``path`` by ``crl``. The old one must have the same issuer and a lower CRLNumber.

    With ``force`` any file is replaced. Raises :class:`CertificateError`; then nothing was changed.
    """
    if not force and os.path.lexists(path):
        current = read_crl(path)
        if current.issuer != crl.issuer:
            raise CertificateError(
                f"{path}: holds the CRL of another authority ({current.issuer.rfc4514_string()}); "
                "choose another file, or overwrite it with --force"
            )
        if crl_number(current) >= crl_number(crl):
            # An older list would let in again what the newer one revoked.
            raise CertificateError(
                f"{path}: holds CRL number {crl_number(current)}, which is not older than number {crl_number(crl)}; "
                "sign a newer one, or overwrite it with --force"
            )
    return write_together([crl_file(path, crl)], force=True)[0]


def crl_number(crl: x509.CertificateRevocationList) -> int:
    """The CRLNumber of ``crl``; raises ``CertificateError`` if it has none, since RFC 5280 requires one."""
    try:
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except (x509.ExtensionNotFound, ValueError) as error:
        raise CertificateError("the CRL has no CRLNumber, so no next one can follow it; sign a new CRL") from error


def _stage(file: PemFile, scratch: ExitStack) -> Path:
    """Write ``file`` whole and synced under a temporary name beside its own; ``scratch`` removes it."""
    temporary = _beside(file.path, "new")
    try:
        # O_EXCL: neither an existing file nor a planted symbolic link is ever written through.
        descriptor = os.open(
            temporary,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
            _SECRET_MODE if file.secret else _MODE,
        )
        scratch.callback(_remove, temporary)
        with open(descriptor, "wb") as stream:
            stream.write(file.content)
            stream.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise _cannot_write(file.path, error) from error
    return temporary


def _give_name(temporary: Path, path: Path, replaced: list[Path], undo: ExitStack, *, force: bool) -> None:
    if force and os.path.lexists(path):
        kept = _beside(path, "old")
        try:
            os.link(path, kept, follow_symlinks=False)
        except OSError:
            # A file system without hard links: for a moment there is no file of that name. A reader takes this for an
            # unfinished write and tries again.
            os.rename(path, kept)
        replaced.append(kept)
        undo.callback(_put_back, kept, path)
        os.replace(temporary, path)
        return
    try:
        # Unlike rename, link never replaces a file: one that appeared after the check above is kept.
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temporary, path)
    undo.callback(_remove, path)


def _beside(path: Path, what: str) -> Path:
    # With the leading dot and the ending, no glob for certificates matches it.
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.{what}")


def _remove(path: Path) -> None:
    with suppress(OSError):
        os.unlink(path)


def _put_back(kept: Path, path: Path) -> None:
    os.replace(kept, path)
    # A rename between two names of one file does nothing, so the spare name may still exist.
    _remove(kept)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; the files themselves are written.
        if error.errno != errno.EINVAL:
            raise _cannot_write(directory, error) from error
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> CertificateError:
    remedy = {
        errno.ENOENT: f"make the directory {path.parent} first",
        errno.EACCES: f"write access to {path.parent} is needed",
        errno.EEXIST: "it appeared just now; overwrite it with --force",
        errno.ENOSPC: "free some space",
    }.get(error.errno or 0, "correct that and try again")
    return CertificateError(f"{path}: cannot be written ({error.strerror or error}), nothing was changed: {remedy}")


# --- PEM --------------------------------------------------------------------------------------------------------


def certificates_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    """The PEM text of ``certificates``, in order."""
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def key_pem(key: PrivateKeyTypes) -> bytes:
    """The PKCS #8 PEM of ``key``, without a password: nobody is there to type one when a relay starts."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def crl_file(path: Path, crl: x509.CertificateRevocationList) -> PemFile:
    """The file that holds ``crl``, for :func:`write_together`."""
    return PemFile(path, crl.public_bytes(serialization.Encoding.PEM))


# --- reading ----------------------------------------------------------------------------------------------------


def read_certificates(path: Path) -> list[x509.Certificate]:
    """All certificates of a PEM file, in order; at least one. Raises :class:`CertificateError`."""
    content = read_file(path)
    try:
        return x509.load_pem_x509_certificates(content)
    except (ValueError, x509.InvalidVersion) as error:
        raise CertificateError(
            f"{path}: no readable certificate in it ({error}); it must hold BEGIN CERTIFICATE in PEM"
        ) from error


def read_crl(path: Path) -> x509.CertificateRevocationList:
    """The CRL of a PEM file. Raises :class:`CertificateError`."""
    content = read_file(path)
    try:
        return x509.load_pem_x509_crl(content)
    except ValueError as error:
        raise CertificateError(
            f"{path}: no readable CRL in it ({error}); it must hold BEGIN X509 CRL in PEM"
        ) from error


def read_private_key(path: Path) -> PrivateKeyTypes:
    """The private key of a PEM file that only its owner can read. Raises :class:`CertificateError`."""
    content = read_file(path, secret=True)
    try:
        return serialization.load_pem_private_key(content, password=None)
    except TypeError:
        raise CertificateError(
            f"{path}: the key has a password, and frelay asks for none; take it off with "
            f"'openssl pkey -in {path} -out NEW' under umask 077"
        ) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        # The parser's text may quote the key, so our message leaves it out.
        raise CertificateError(f"{path}: no readable private key in it; it must be PEM, best PKCS #8") from error


def read_file(path: Path, *, secret: bool = False) -> bytes:
    """The content of a PEM file; a ``secret`` one is its owner's alone. Raises :class:`CertificateError`."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise CertificateError(f"{path}: is not a regular file; give the path of a PEM file")
            if secret and (objection := objection_to_mode(facts, path)) is not None:
                raise CertificateError(f"{path}: {objection}, and replace the key if anyone may have read it")
            content = stream.read(_MAX_FILE + 1)
    except OSError as error:
        raise CertificateError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its mode"
        ) from error
    if len(content) > _MAX_FILE:
        raise CertificateError(f"{path}: larger than {_MAX_FILE // 1024 // 1024} MiB; this is no PEM file of ours")
    return content


def _open_without_waiting(name: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a FIFO would wait for its writer, and a wrong path would hang the program.
    return os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)
