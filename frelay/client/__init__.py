"""The function's side: joining a route, and the wire to the other function. Standard library only.

``frelay.client.trio`` and ``frelay.client.asyncio`` are loaded when they are first used: a function needs one of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from frelay.client.installed import warn_if_both

if TYPE_CHECKING:
    from frelay.client import asyncio, blocking, trio

__all__ = ["asyncio", "blocking", "trio"]

warn_if_both()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != "trio":
            raise
        raise ModuleNotFoundError(
            "frelay.client.trio needs the library trio, which is not installed: pip install trio", name="trio"
        ) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
