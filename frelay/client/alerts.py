"""TLS alerts that say what is wrong with our own certificate, in words. Standard library only.

The other side of a TLS connection that refuses a certificate says so by an alert, and the ssl module shows it as an
``SSLError`` whose reason is OpenSSL's name for that alert. In TLS 1.3 a client has finished its handshake before the
server judges its certificate, so that it learns of a refusal only when it reads.
"""

from __future__ import annotations

import re
from typing import Final

from frelay.protocol.messages import Role

__all__ = ["certificate_alert", "refusal_of_certificate"]

# RFC 8446, 6.2. OpenSSL's names have the version in front in which an alert was new: sslv3, tlsv1, tlsv13.
_ALERT: Final = re.compile(
    r"ALERT_((?:NO|BAD|UNSUPPORTED)_CERTIFICATE|CERTIFICATE_(?:REVOKED|EXPIRED|UNKNOWN|REQUIRED)|UNKNOWN_CA|ACCESS_DENIED)"
)
_MEANINGS: Final = {
    "BAD_CERTIFICATE": "it is damaged, not valid yet, or its chain breaks a rule",
    "CERTIFICATE_EXPIRED": "it has expired, as the other function's clock has it",
    "CERTIFICATE_REVOKED": "it is revoked",
    "CERTIFICATE_REQUIRED": "none was shown",
    "NO_CERTIFICATE": "none was shown",
    "UNKNOWN_CA": "the other function does not know the CA that it is from; compare ca and inner_ca there, "
    "and add intermediate certificates, if there are any, to the file of the certificate here",
    "ACCESS_DENIED": "it is not let in",
}


def certificate_alert(error: Exception) -> str | None:
    """The name of the alert in ``error`` if it is about our certificate, e.g. ``UNKNOWN_CA``, else None."""
    # Python has no name for a few of OpenSSL's reasons, and then only the sentence.
    text = str(getattr(error, "reason", None) or error).upper().replace(" ", "_")
    found = _ALERT.search(text)
    return None if found is None else found[1]


def refusal_of_certificate(error: Exception, role: Role) -> str | None:
    """A sentence that says that and why the other function refused our certificate; None if ``error`` is another."""
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
