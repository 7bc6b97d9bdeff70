"""Loads a route file: it makes a :class:`~frelay.config.model.Config`, or reports every problem at once.

A person who corrects a file wants one list, not one error after the other. So no mistake stops the loading:

1. each table is validated by itself; one that fails is reported and left out;
2. the rules between keys and tables (``rules``) are checked on the parsed file, also for tables that failed;
3. a Config is made only if there are no problems.

``routes_dir`` adds more files. Each holds the keys of one route at its top level, and is named as the route. They are
read after the route file, in the order of their names, and use its groups and limits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from frelay.config.document import (
    ARRAYS,
    SECTIONS,
    Document,
    KeyPath,
    explain,
    parse_document,
    read_document,
    shown,
    unknown_key,
)
from frelay.config.model import (
    AdminSection,
    Config,
    GroupTable,
    Limits,
    MetricsSection,
    RelaySection,
    RouteTable,
    Section,
    TcpSection,
    TlsSection,
    ValueContext,
    is_name,
)
from frelay.config.route_files import RouteFileEdit
from frelay.config.rules import (
    UncheckedRoute,
    check_addresses,
    check_keys_together,
    check_names,
    check_servers,
    check_stalls,
    check_tls,
)
from frelay.errors import ConfigError, Problem
from frelay.protocol.identity import Selector

__all__ = ["load", "load_sections", "route_files"]

SectionType = TypeVar("SectionType", bound=Section)


def load(path: Path | str, *, edit: RouteFileEdit | None = None, base: Path | None = None) -> Config:
    """Read the route file at ``path`` and the files of its ``routes_dir``; with ``edit``, as if that were written.

    Relative paths in the file start from ``base``, by default from the file's own directory.

    Raises:
        ConfigError: with all problems, in the order of the files and of their lines. Their paths are absolute.
    """
    problems: list[Problem] = []
    main = read_document(Path(path).absolute(), problems)
    config = None if main is None else _assemble(main, problems, edit, base or main.path.parent)
    if config is None:
        raise ConfigError(problems)
    return config


def load_sections(path: Path | str, *, base: Path | None = None) -> Config | None:
    """The valid sections of the route file at ``path``, without its routes; None if it cannot be read.

    When :func:`load` has refused a file, this still finds the certificates that it names, so that their problems are
    reported together with those of the file.
    """
    main = read_document(Path(path).absolute(), [])
    if main is None:
        return None
    context = ValueContext(base or main.path.parent)
    return Config(
        path=main.path,
        relay=_section(main, "relay", RelaySection, context) or RelaySection(),
        tls=_section(main, "tls", TlsSection, context),
        tcp=_section(main, "tcp", TcpSection, context) or TcpSection(),
    )


def route_files(directory: Path) -> tuple[Path, ...]:
    """The files of a ``routes_dir`` that hold routes, sorted: ``*.toml`` without hidden files.

    A directory that does not exist has none. Raises OSError for one that cannot be listed.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return ()
    return tuple(directory / name for name in sorted(names) if name.endswith(".toml") and name[0] != ".")


def _assemble(main: Document, problems: list[Problem], edit: RouteFileEdit | None, base: Path) -> Config | None:
    """The configuration whose route file is ``main``, or None once there are ``problems``."""
    for key in main.table:
        if key not in SECTIONS and key not in ARRAYS:
            main.report((key,), unknown_key(key, (*SECTIONS, *ARRAYS)))

    relay = _section(main, "relay", RelaySection, ValueContext(base))
    tls = _section(main, "tls", TlsSection, ValueContext(base))
    limits = _section(main, "limits", Limits, ValueContext(base)) or Limits()
    tcp = _section(main, "tcp", TcpSection, ValueContext(base)) or TcpSection()
    groups = _groups(main, ValueContext(base))
    context = ValueContext(base, groups)
    admin = _section(main, "admin", AdminSection, context)
    metrics = _section(main, "metrics", MetricsSection, context)

    files = [main.path]
    written = [UncheckedRoute(main, key_path, table) for key_path, table in _tables(main, "route")]
    routes_dir = _routes_dir(main, relay, base)
    written += _routes_of_directory(main, routes_dir, files, edit)
    routes: list[tuple[UncheckedRoute, RouteTable]] = []
    for route in written:
        check_keys_together(route)
        table = _validated(route.document, route.key_path, route.table, RouteTable, context)
        if table is not None:
            routes.append((route, table))
    check_names(written)
    check_addresses(written)
    check_servers(main, admin, metrics, written)
    check_tls(main, written)
    check_stalls(main, limits, tcp, routes)

    if problems:
        order = {path: index for index, path in enumerate(files)}
        problems.sort(key=lambda problem: (order[problem.file], problem.line or 0))
        return None
    return Config(
        path=main.path,
        relay=(relay or RelaySection()).model_copy(update={"routes_dir": routes_dir}),
        tls=tls,
        limits=limits,
        tcp=tcp,
        admin=admin,
        metrics=metrics,
        groups=groups,
        routes=tuple(table.effective(limits, route.document.path) for route, table in routes),
        files=tuple(files),
    )


# --- tables ----------------------------------------------------------------------------------------------------


def _validated(
    document: Document, key_path: KeyPath, table: dict[str, Any], model: type[SectionType], context: ValueContext
) -> SectionType | None:
    """``table`` as a ``model``, or None after reporting all its problems."""
    try:
        return model.model_validate(table, context=context)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            document.report((*key_path, *found["loc"]), explain(found, model))
        return None


def _section(main: Document, name: str, model: type[SectionType], context: ValueContext) -> SectionType | None:
    """The section ``[name]``, or None if it is absent or was reported."""
    if name not in main.table:
        return None
    table = main.table[name]
    if not isinstance(table, dict):
        main.report((name,), f"must be a table: write [{name}], in single brackets, and its keys below it")
        return None
    return _validated(main, (name,), table, model, context)


def _tables(main: Document, name: str) -> list[tuple[KeyPath, dict[str, Any]]]:
    """The tables of ``[[name]]`` with their key paths."""
    written = main.table.get(name, [])
    if not isinstance(written, list):
        main.report((name,), f"must be a list of tables: write [[{name}]], in double brackets")
        return []
    tables: list[tuple[KeyPath, dict[str, Any]]] = []
    for index, table in enumerate(written):
        if isinstance(table, dict):
            tables.append(((name, index), table))
        else:
            main.report((name, index), f"must be a table, not {shown(table)}: write [[{name}]] and its keys below it")
    return tables


def _groups(main: Document, context: ValueContext) -> dict[str, tuple[Selector, ...]]:
    groups: dict[str, tuple[Selector, ...]] = {}
    first: dict[str, KeyPath] = {}
    for key_path, table in _tables(main, "group"):
        group = _validated(main, key_path, table, GroupTable, context)
        name = table.get("name")
        if not is_name(name):
            continue
        if name in first:
            taken = main.where((*first[name], "name"))
            main.report((*key_path, "name"), f'there is a group "{name}" already, at {taken}')
            continue
        first[name] = key_path
        # A group with a mistake still exists: the routes that name it get no problem of their own.
        groups[name] = () if group is None else group.parties
    return groups


# --- routes_dir ------------------------------------------------------------------------------------------------


def _routes_dir(main: Document, relay: RelaySection | None, base: Path) -> Path | None:
    """The directory with more routes: as the file says, or ``routes.d`` beside it; None if the file says no path."""
    default = base / "routes.d"
    if relay is not None:
        return relay.routes_dir or default
    section = main.table.get("relay")
    if not isinstance(section, dict) or "routes_dir" not in section:
        return default
    try:
        # Another key of [relay] was wrong; the routes can still be checked.
        only = RelaySection.model_validate({"routes_dir": section["routes_dir"]}, context=ValueContext(base))
    except ValidationError:
        return None
    return only.routes_dir


def _routes_of_directory(
    main: Document, directory: Path | None, files: list[Path], edit: RouteFileEdit | None
) -> list[UncheckedRoute]:
    """The routes of ``routes_dir``, one in each file. Adds to ``files``, and problems to those of ``main``."""
    if directory is None:
        return []
    try:
        paths = set(route_files(directory))
    except OSError as error:
        main.report(("relay", "routes_dir"), f"cannot be listed: {error.strerror}: {directory}")
        return []
    if edit is not None:
        paths = paths - {edit.path} if edit.content is None else paths | {edit.path}
    routes: list[UncheckedRoute] = []
    for path in sorted(paths):
        files.append(path)
        if edit is not None and path == edit.path and edit.content is not None:
            document = parse_document(path, edit.content, main.problems)
        else:
            # It may be gone: the admin API can delete a route after the directory was listed.
            document = read_document(path, main.problems, may_be_gone=True)
        if document is None:
            continue
        if "route" in document.table:
            document.report(
                ("route",), "is not allowed here: a file of routes_dir holds the keys of one route, without [[route]]"
            )
            continue
        route = UncheckedRoute(document, (), document.table)
        routes.append(route)
        if route.name is not None and route.name != path.stem:
            route.report("name", f"must be the name of the file, {shown(path.stem)}: rename one of the two")
    return routes
