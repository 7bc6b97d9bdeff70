"""What ``help()`` shows of the Trio and asyncio ``connect``: their arguments one by one, not ``**options``.

:func:`frelay.connect` writes the arguments out; the two others show the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from frelay.client.blocking import connect as blocking_connect

__all__ = ["shows_its_options"]

Function = TypeVar("Function", bound=Callable[..., Any])


def shows_its_options(connect: Function) -> Function:
    """A decorator: the signature of ``connect`` shows the arguments of ``frelay.connect`` instead of ``**options``."""
    own = inspect.signature(connect)
    options = [one for one in inspect.signature(blocking_connect).parameters.values() if one.name not in own.parameters]
    first, more = [], []
    for one in own.parameters.values():
        if one.kind is inspect.Parameter.KEYWORD_ONLY:
            more.append(one)
        elif one.kind is not inspect.Parameter.VAR_KEYWORD:
            first.append(one)
    signature = own.replace(parameters=[*first, *options, *more])
    setattr(connect, "__signature__", signature)  # noqa: B010  inspect and help() read it; no type declares it
    return connect
