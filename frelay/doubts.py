"""What keeps functions out of a configuration that is valid.

``frelay check`` tells it, and it is logged when the configuration is put in force. A doubt is a
:class:`~frelay.errors.Problem` that stops no relay. What is wrong with the files of certificates was found when they
were loaded (:attr:`~frelay.tls.context.OuterTls.warnings`); what is added here takes the routes, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from frelay.config.model import Config, Dial, Party, Route
from frelay.errors import Problem
from frelay.tls.context import OuterTls

__all__ = ["doubts", "log_doubts"]

_SHOWN: Final = 8


def doubts(config: Config, trust: OuterTls | None) -> tuple[Problem, ...]:
    """All doubts about ``config``, for which ``trust`` was loaded."""
    if trust is None:
        return ()
    return (*trust.warnings, *(found for route in config.routes for found in _of_route(route, trust)))


def log_doubts(config: Config, trust: OuterTls | None, log: Any) -> None:
    """One line of the log for each."""
    if trust is not None and not trust.is_open:
        log.error("the certificates in force let nobody in", file=str(config.path))
    for doubt in doubts(config, trust):
        log.warning("configuration warning", problem=str(doubt))


def _of_route(route: Route, trust: OuterTls) -> Iterator[Problem]:
    if route.outer == "none" or not trust.is_open:
        return
    sides: tuple[tuple[str, Party], ...] = (("func1", route.func1), ("func2", route.func2))
    for party, side in sides:
        if isinstance(side, Dial) or any(limits.permit(one) for limits in trust.name_limits for one in side):
            continue
        names = ", ".join(map(str, side[:_SHOWN])) + (", ..." if len(side) > _SHOWN else "")
        yield Problem(
            route.source,
            f"no certificate can fit {names}: the name constraints of every authority of tls.client_ca exclude it; "
            "choose a name that they permit, or add the authority that may give this one",
            key=f"route[{route.name}].{party}",
        )
