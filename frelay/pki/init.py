"""What ``frelay init DIR`` writes: a relay that runs as it is, with one route between two functions.

Everything is made in memory first and then written together, so that an ``init`` that is refused or fails leaves no
incomplete directory behind.
"""

from __future__ import annotations

import os
import shlex
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from frelay.pki.authority import Algorithm, Authority
from frelay.pki.files import PemFile, crl_file, git_ignore, make_directory, write_together
from frelay.protocol.identity import OddName, dns_name

__all__ = ["initialise", "summary"]

# Of the authority and of the CRL: a first relay must not refuse everybody after a month because nobody renewed an empty
# list.
_DAYS: Final = 3650

_RELAY_TOML: Final = """\
# A relay with one route. Run it:  frelay run -c relay.toml
# Paths are relative to this file, durations are seconds. It is read again on SIGHUP and when it changes.

[relay]
name = "relay-1"

[tls]
certificate = "certs/relay.pem"
private_key = "certs/relay.key"     # mode 0600, or the relay refuses it
client_ca = "certs/ca.pem"          # the authority that issues the certificates of functions
crl = "certs/crl.pem"               # certificates that are revoked; if this list is out of date, nobody is let in

ADMIN
[[route]]
name = "demo"
listen = "127.0.0.1:9001"           # ["0.0.0.0:9001", "[::]:9001"] for functions on other machines
func1 = "dns:func1.demo"            # only certificates with these names are let in: one name for each of the two
func2 = "dns:func2.demo"            # parties
"""


_LONGEST_SOCKET_PATH: Final = 107  # sun_path of unix(7), less its NUL

_ADMIN: Final = """\
[admin]                             # frelay status, top and route connect to it; only this user may
listen = "unix:frelay.sock"
"""

_NO_ADMIN: Final = """\
# [admin]                           # frelay status, top and route connect to it; commented out, because the path of a
# listen = "unix:frelay.sock"       # Unix socket has at most 107 bytes, and in this directory it would be longer
"""


def initialise(
    directory: Path,
    *,
    force: bool = False,
    algorithm: Algorithm = "p256",
    host_name: str | None = None,
) -> list[Path]:
    """Write an authority, a relay's and two functions' certificates, an empty CRL and ``relay.toml``.

    ``host_name`` goes into the relay's certificate beside ``relay.demo``, ``localhost``, ``127.0.0.1`` and ``::1``;
    by default it is this machine's. Returns the files written, ``relay.toml`` last; ``directory`` is made if it is
    missing. With them goes a ``.gitignore`` for the keys, unless there is one.

    Raises:
        CertificateError: a file would be overwritten (and ``force`` is not set), or could not be written. Names the
            files and the remedy; nothing was changed.
    """
    certs = directory / "certs"
    config = directory / "relay.toml"
    pairs = {who: (certs / f"{who}.pem", certs / f"{who}.key") for who in ("ca", "relay", "func1", "func2")}
    crl = certs / "crl.pem"
    authority = Authority.create("frelay demo CA", days=_DAYS, algorithm=algorithm)
    relay = authority.issue(
        common_name="relay.demo",
        dns=["relay.demo", "localhost", *_usable(socket.gethostname() if host_name is None else host_name)],
        ips=["127.0.0.1", "::1"],
        usage="relay",
        algorithm=algorithm,
    )
    files = [*authority.files(*pairs["ca"]), *relay.files(*pairs["relay"])]
    for who in ("func1", "func2"):
        party = authority.issue(common_name=f"{who}.demo", dns=[f"{who}.demo"], usage="party", algorithm=algorithm)
        files += party.files(*pairs[who])
    files.append(crl_file(crl, authority.revocation_list(number=1, days=_DAYS)))
    # It goes into certs if DIR has a .gitignore of its own.
    files += git_ignore(directory, certs)
    files.append(PemFile(config, _RELAY_TOML.replace("ADMIN\n", _admin(directory)).encode()))

    with ExitStack() as undo:
        for made, mode in ((directory, 0o777), (certs, 0o700)):
            make_directory(made, mode, undo)
        written = write_together(files, force=force)
        undo.pop_all()
    return written


def _admin(directory: Path) -> str:
    socket_path = str(directory.absolute() / "frelay.sock")
    return _ADMIN if len(os.fsencode(socket_path)) <= _LONGEST_SOCKET_PATH else _NO_ADMIN


def summary(written: list[Path]) -> str:
    """The message of ``frelay init``, from what :func:`initialise` returned."""
    directory = written[-1].parent
    shown = [os.path.relpath(path, directory) for path in written]
    width = max(map(len, shown), default=0)
    lines = [f"  {name:<{width}}  {_MEANING.get(name, '')}".rstrip() for name in shown]
    return "\n".join(
        [
            f"wrote {len(written)} files in {directory}:",
            *lines,
            "",
            f"next: frelay run -c {shlex.quote(str(written[-1]))}",
        ]
    )


_MEANING: Final = {
    "certs/ca.pem": "the authority: every function and the relay trust this one",
    "certs/ca.key": "its key: signs new certificates; keep it off the relay's machine",
    "certs/relay.pem": "the relay's certificate",
    "certs/relay.key": "its key",
    "certs/func1.pem": "dns:func1.demo",
    "certs/func1.key": "its key: goes where func1 runs, nowhere else",
    "certs/func2.pem": "dns:func2.demo",
    "certs/func2.key": "its key: goes where func2 runs, nowhere else",
    "certs/crl.pem": "who is revoked: nobody yet",
    ".gitignore": "keeps the keys out of a git repository",
    "certs/.gitignore": "keeps the keys out of a git repository",
    "relay.toml": "one route, demo, on 127.0.0.1:9001",
}


def _usable(host_name: str) -> list[str]:
    # A machine may have a name that no certificate can hold; then it is left out.
    try:
        return [dns_name(host_name).value]
    except OddName:
        return []
