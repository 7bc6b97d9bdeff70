"""A configuration as a route file would write it: TOML's types only, every key with its value in force.

The inverse of ``load``, for whoever shows a configuration (the admin API), compares one (an ETag), or takes one over
from another process (``frelay plan``): :func:`load_written` makes a Config of it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frelay.config.model import (
    Addresses,
    AdminSection,
    Config,
    Dial,
    Limits,
    MetricsSection,
    RelaySection,
    Route,
    RouteLimits,
    Section,
    TcpSection,
    TlsSection,
)
from frelay.protocol.identity import parse_selector

__all__ = ["config_as_written", "load_written", "route_as_written"]


def _value(value: Any) -> Any:
    if isinstance(value, Dial | Addresses):
        return value.as_written()
    if isinstance(value, Section):
        return {name: _value(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple):
        return [_value(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def route_as_written(route: Route) -> dict[str, Any]:
    """The keys of a route; its effective limits stand together under ``limits``."""
    table = _value(route)
    del table["source"]
    return dict(table)


def config_as_written(config: Config) -> dict[str, Any]:
    """The whole, with ``path`` and the ``source`` of each route; sections that are not there are null."""
    return {
        "path": str(config.path),
        **{name: _value(getattr(config, name)) for name in ("relay", "tls", "limits", "tcp", "admin", "metrics")},
        "routes": [{**route_as_written(route), "source": str(route.source)} for route in config.routes],
    }


def load_written(table: Mapping[str, Any]) -> Config:
    """The Config of which ``table`` is :func:`config_as_written`, but for ``files`` and groups, which are expanded.

    Raises ValueError for a table that another version wrote in another way.
    """

    def section(name: str, model: type[Section]) -> Any:
        if table[name] is None:
            return None
        # An empty list stands for a key that was not there, as admin.allow beside a Unix socket; a file cannot say so.
        return model.model_validate({key: value for key, value in table[name].items() if value != []})

    try:
        return Config(
            path=Path(table["path"]),
            relay=section("relay", RelaySection),
            tls=section("tls", TlsSection),
            limits=section("limits", Limits),
            tcp=section("tcp", TcpSection),
            admin=section("admin", AdminSection),
            metrics=section("metrics", MetricsSection),
            routes=tuple(
                Route.model_validate(
                    {**route, "limits": RouteLimits.model_validate(route["limits"]), "source": Path(route["source"])}
                    | {name: _party(route[name]) for name in ("func1", "func2")}
                )
                for route in table["routes"]
            ),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no configuration as frelay writes it: {error!r}") from error


def _party(value: Any) -> Any:
    # An empty list stands for "nobody in particular" on a plain route; a file cannot say so.
    return tuple(parse_selector(one) for one in value) if isinstance(value, list) else value
