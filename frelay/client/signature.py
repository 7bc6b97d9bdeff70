"""The arguments of the three ``connect``, shown by ``help()`` as they are, not as ``**options``.

They are written once, at :meth:`frelay.client.joining.JoinPlan.make`; the blocking client repeats them for its readers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from frelay.client.options import JoinPlan

__all__ = ["shows_its_options"]

Function = TypeVar("Function", bound=Callable[..., Any])


def shows_its_options(connect: Function) -> Function:
    """A decorator: the signature of ``connect`` shows the arguments of ``JoinPlan.make`` instead of ``**options``."""
    own = inspect.signature(connect)
    options = [one for one in inspect.signature(JoinPlan.make).parameters.values() if one.name not in own.parameters]
    first, more = [], []
    for one in own.parameters.values():
        if one.kind is inspect.Parameter.KEYWORD_ONLY:
            more.append(one)
        elif one.kind is not inspect.Parameter.VAR_KEYWORD:
            first.append(one)
    signature = own.replace(parameters=[*first, *options, *more])
    setattr(connect, "__signature__", signature)  # noqa: B010  what inspect and help() look at; no type has it
    return connect
