"""Warnings about a configuration that is valid: what in it keeps functions out.

``frelay check`` prints them, and they are logged when the configuration is put in force. A warning is a
:class:`~frelay.errors.Problem` that does not stop the relay. Loading the certificates has given warnings about their
files (:attr:`~frelay.tls.trust.OuterTls.warnings`); this module adds those that follow from the routes as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from frelay.config.model import Config, Dial, Party, Route
from frelay.errors import Problem
from frelay.protocol.identity import Selector
from frelay.tls.trust import OuterTls

__all__ = ["log_warnings", "warnings_of"]

_SHOWN: Final = 8


def warnings_of(config: Config, trust: OuterTls | None) -> tuple[Problem, ...]:
    """All warnings about ``config``, for which ``trust`` was loaded."""
    if trust is None:
        return ()
    routes = (found for route in config.routes for found in _of_route(route, trust))
    return (*trust.warnings, *routes, *_of_admin(config, trust))


def log_warnings(config: Config, trust: OuterTls | None, log: Any) -> None:
    """Log each warning in a line of its own."""
    if trust is not None and not trust.is_open:
        log.error("the certificates in force let nobody in", file=str(config.path))
    for warning in warnings_of(config, trust):
        log.warning("configuration warning", problem=str(warning))


def _of_route(route: Route, trust: OuterTls) -> Iterator[Problem]:
    if route.outer == "none":
        return
    sides: tuple[tuple[str, Party], ...] = (("func1", route.func1), ("func2", route.func2))
    for party, side in sides:
        if not isinstance(side, Dial) and (text := _nobody_fits(side, trust)) is not None:
            yield Problem(route.source, text, key=f"route[{route.name}].{party}")


def _of_admin(config: Config, trust: OuterTls) -> Iterator[Problem]:
    allow = () if config.admin is None else config.admin.allow
    if allow and (text := _nobody_fits(allow, trust)) is not None:
        yield Problem(config.path, text, key="admin.allow")


def _nobody_fits(selectors: Sequence[Selector], trust: OuterTls) -> str | None:
    """Why no certificate can fit any of ``selectors``; None unless that is certain."""
    if not trust.is_open or any(limits.permit(one) for limits in trust.name_limits for one in selectors):
        return None
    names = ", ".join(map(str, selectors[:_SHOWN])) + (", ..." if len(selectors) > _SHOWN else "")
    return (
        f"no certificate can fit {names}: the name constraints of every authority of tls.client_ca exclude it; choose "
        "a name that they permit, or add the authority that may give this one"
    )
