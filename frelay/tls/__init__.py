"""The outer TLS: contexts, streams and identities. With ``pki/`` the only rooms that know OpenSSL.

OpenSSL reads its configuration once, when it is first loaded, and two settings can be made nowhere else: that no
session tickets are sent, and which key exchanges there are (``openssl.cnf`` beside this file says why it matters). So
it is loaded here, before anything in this room, with that file named in the environment for just that moment. An
operator's own ``OPENSSL_CONF`` has the last word; then that file must say both, ``NumTickets = 0`` above all.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Final

_VARIABLE: Final = "OPENSSL_CONF"


def _load_openssl() -> None:
    if _VARIABLE in os.environ:
        return
    os.environ[_VARIABLE] = str(Path(__file__).with_name("openssl.cnf"))
    try:
        import_module("cryptography.hazmat.bindings.openssl.binding")
    finally:
        # Not for our children: it would be the configuration of their OpenSSL, too.
        del os.environ[_VARIABLE]


_load_openssl()
