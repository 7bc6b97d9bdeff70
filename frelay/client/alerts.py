"""What a TLS alert says about our own certificate, in words. Standard library only.

A TLS side that refuses the other's certificate sends an alert. The ssl module raises it as an ``SSLError`` whose
reason is OpenSSL's name for the alert. In TLS 1.3 a client finishes its handshake before the server checks the client's
certificate, so the client learns of a refusal only when it reads.
"""

from __future__ import annotations

import re
from typing import Final

from frelay.protocol.messages import Role

__all__ = ["certificate_alert", "refusal_of_certificate"]

# RFC 8446, 6.2. OpenSSL puts the version that introduced an alert before its name: sslv3, tlsv1, tlsv13.
_ALERT: Final = re.compile(
    r"ALERT_((?:NO|BAD|UNSUPPORTED)_CERTIFICATE|CERTIFICATE_(?:REVOKED|EXPIRED|UNKNOWN|REQUIRED)|UNKNOWN_CA|ACCESS_DENIED)"
)
_MEANINGS: Final = {
    "BAD_CERTIFICATE": "it is damaged, not valid yet, or its chain breaks a rule",
    "CERTIFICATE_EXPIRED": "it has expired by the other function's clock",
    "CERTIFICATE_REVOKED": "it is revoked",
    "CERTIFICATE_REQUIRED": "none was shown",
    "NO_CERTIFICATE": "none was shown",
    "UNKNOWN_CA": "the other function does not know the CA that issued it; compare ca and inner_ca there, "
    "and add intermediate certificates, if there are any, to the file of the certificate here",
    "ACCESS_DENIED": "the other function does not let it in",
}


def certificate_alert(error: Exception) -> str | None:
    """The name of the alert in ``error``, e.g. ``UNKNOWN_CA``; None if it is not about our certificate."""
    # Python has no name for some of OpenSSL's reasons. Then the error holds only OpenSSL's sentence.
    text = str(getattr(error, "reason", None) or error).upper().replace(" ", "_")
    found = _ALERT.search(text)
    return None if found is None else found[1]


def refusal_of_certificate(error: Exception, role: Role) -> str | None:
    """A sentence: the other function refused our certificate, and why. None if ``error`` is about something else."""
    alert = certificate_alert(error)
    if alert is None:
        return None
    if alert == "UNSUPPORTED_CERTIFICATE":
        purpose = "serverAuth" if role == "server" else "clientAuth"
        meaning = (
            f"this function plays the TLS {role}, and its certificate is not made for that; "
            f"its extended key usage needs {purpose}"
        )
    else:
        meaning = _MEANINGS.get(alert, "it does not say why")
    name = alert.lower().replace("_", " ")
    return f"the other function refused this function's own certificate ({name}): {meaning}"
