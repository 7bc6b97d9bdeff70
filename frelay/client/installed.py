"""Which distribution this package was installed from: frelay, or frelay-client, which is a part of it.

Both write their files into the same directory. If both are installed, removing one of them takes files of the other
away. pip does not notice that, so frelay says it.
"""

from __future__ import annotations

import os
import warnings
from typing import Final

__all__ = ["has_client_only", "warn_if_both"]

_PACKAGE: Final = os.path.dirname(os.path.dirname(__file__))
# deploy/client/pyproject.toml puts this file into frelay-client.
_MARK: Final = os.path.join(_PACKAGE, "frelay-client.txt")
_RELAY: Final = os.path.join(_PACKAGE, "relay")


def has_client_only() -> bool:
    """Whether this is frelay-client, without a relay."""
    return os.path.exists(_MARK) and not os.path.exists(_RELAY)


def warn_if_both() -> None:
    """Warn if both distributions are installed here; it costs a function one look for a file."""
    if os.path.exists(_MARK) and os.path.exists(_RELAY):
        warnings.warn(
            "frelay and frelay-client are both installed, and they share their files: keep one of them, by "
            "pip uninstall frelay frelay-client, then pip install frelay (or frelay-client)",
            stacklevel=3,
        )
