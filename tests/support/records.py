"""TLS 1.3 records made by hand: no TLS library sends them, and the relay must survive them.

A :class:`RecordForge` takes over the sending half of a ``Party`` after its handshake, with the traffic secret that the
standard library logs. From then on it makes every record that goes to the relay: thousands of KeyUpdates, empty
records, unencrypted alerts. Do not use the party's own ``send`` and ``close_notify`` any more, because its TLS counts
records too. The layouts are those of RFC 8446, sections 5 and 7.
"""

from __future__ import annotations

import ssl
import struct
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, HashAlgorithm
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

__all__ = ["ALERT", "APPLICATION_DATA", "CLOSE_NOTIFY", "HANDSHAKE", "PLAIN_CLOSE_NOTIFY", "RecordForge", "log_keys"]

ALERT: Final = 21
HANDSHAKE: Final = 22
APPLICATION_DATA: Final = 23

CLOSE_NOTIFY: Final = b"\x01\x00"
"""The alert, as it stands inside a record."""
PLAIN_CLOSE_NOTIFY: Final = b"\x15\x03\x03\x00\x02" + CLOSE_NOTIFY
"""An unencrypted close_notify: anybody on the path can write it."""

_CIPHERS: Final[dict[str, tuple[type[AESGCM] | type[ChaCha20Poly1305], int, HashAlgorithm]]] = {
    "TLS_AES_128_GCM_SHA256": (AESGCM, 16, SHA256()),
    "TLS_AES_256_GCM_SHA384": (AESGCM, 32, SHA384()),
    "TLS_CHACHA20_POLY1305_SHA256": (ChaCha20Poly1305, 32, SHA256()),
}


def log_keys(context: ssl.SSLContext, file: Path) -> ssl.SSLContext:
    """Let ``context`` log its secrets to ``file``, which must serve one connection only; returns ``context``."""
    context.keylog_filename = str(file)
    return context


class RecordForge:
    """The client's sending half of a TLS 1.3 connection, from its first record of application data on."""

    def __init__(self, tls: ssl.SSLObject, keylog: Path) -> None:
        cipher = tls.cipher()
        assert cipher is not None, "the handshake is not done"
        self._aead, self._key_size, self._hash = _CIPHERS[cipher[0]]
        secrets = dict(line.split()[::2] for line in keylog.read_text().splitlines() if not line.startswith("#"))
        self._take_secret(bytes.fromhex(secrets["CLIENT_TRAFFIC_SECRET_0"]))

    def _take_secret(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = self._aead(self._expand("key", self._key_size))
        self._iv = int.from_bytes(self._expand("iv", 12), "big")
        self._sequence = 0

    def _expand(self, label: str, length: int) -> bytes:
        name = b"tls13 " + label.encode()
        info = struct.pack(">HB", length, len(name)) + name + b"\x00"
        return HKDFExpand(algorithm=self._hash, length=length, info=info).derive(self._secret)

    def record(self, content: bytes, kind: int = APPLICATION_DATA, *, padding: int = 0) -> bytes:
        """The next record, encrypted; ``padding`` zero bytes hide how long ``content`` is."""
        inner = content + bytes([kind]) + bytes(padding)
        header = struct.pack(">BHH", APPLICATION_DATA, 0x0303, len(inner) + 16)
        nonce = (self._iv ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        return header + self._cipher.encrypt(nonce, inner, header)

    def key_update(self, *, request: bool = False) -> bytes:
        """A KeyUpdate; the records after it use the new key."""
        record = self.record(b"\x18\x00\x00\x01" + bytes([request]), HANDSHAKE)
        self.update_key()
        return record

    def update_key(self) -> None:
        """Go on with the next key."""
        self._take_secret(self._expand("traffic upd", self._hash.digest_size))

    def close_notify(self) -> bytes:
        """The end of this direction."""
        return self.record(CLOSE_NOTIFY, ALERT)
