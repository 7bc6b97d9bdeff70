"""The outer TLS: contexts, streams and identities. Only this room and ``pki/`` know OpenSSL.

OpenSSL reads its configuration file once, when it is loaded, and two settings can be made only there: that no session
tickets are sent, and which key exchanges are offered (``openssl.cnf`` beside this file says why this matters). So this
package loads OpenSSL before any module in it, and the environment names that file only during the load. If the
operator has set ``OPENSSL_CONF``, OpenSSL reads that file instead; then it must make both settings, above all
``NumTickets = 0``.
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
        # Processes that we start would inherit it, and their OpenSSL would read it.
        del os.environ[_VARIABLE]


_load_openssl()
