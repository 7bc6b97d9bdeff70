"""A configuration as plain data: every key with the value in force, in the types of TOML.

This is the inverse of ``load``. The admin API shows it, makes ETags of it, and sends it to other processes (workers,
``frelay plan``); there :func:`load_dump` makes a Config of it again.
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

__all__ = ["dump_config", "dump_route", "load_dump"]


def _value(value: Any) -> Any:
    if isinstance(value, Dial | Addresses):
        return value.as_toml()
    if isinstance(value, Section):
        return {name: _value(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple):
        return [_value(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def dump_route(route: Route) -> dict[str, Any]:
    """The keys of a route; its effective limits are together in ``limits``."""
    table = _value(route)
    del table["source"]
    return dict(table)


def dump_config(config: Config) -> dict[str, Any]:
    """A whole configuration, with ``path`` and the ``source`` of each route; a section that is absent is None."""
    return {
        "path": str(config.path),
        **{name: _value(getattr(config, name)) for name in ("relay", "tls", "limits", "tcp", "admin", "metrics")},
        "routes": [{**dump_route(route), "source": str(route.source)} for route in config.routes],
    }


def load_dump(table: Mapping[str, Any]) -> Config:
    """Make the Config again whose :func:`dump_config` is ``table``. It lacks ``files`` and groups: those are expanded.

    Raises ValueError if another version of frelay made the table in another form.
    """

    def section(name: str, model: type[Section]) -> Any:
        if table[name] is None:
            return None
        # An empty list stands for an absent key, such as admin.allow with a Unix socket; load accepts no empty list.
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
        raise ValueError(f"this is not the form in which frelay writes a configuration: {error!r}") from error


def _party(value: Any) -> Any:
    # An empty list stands for the absent party of a plain route; the model accepts no empty list.
    return tuple(parse_selector(one) for one in value) if isinstance(value, list) else value
