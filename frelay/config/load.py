"""A route file to a :class:`~frelay.config.model.Config`, or to every problem in it at once.

A person who mends a file wants one list, not one error a try. So nothing stops at the first mistake, and every step
can go on beside one:

1. each table is validated by itself; one that fails is reported and set aside;
2. the rules between keys and tables (``rules``) are judged on what is written;
3. only where the list of problems is empty is a Config made.

``routes_dir`` adds files to this: one route each, its keys at the top level, its name that of the file. They are
read in the order of their names, after the route file, and share its groups, limits and addresses.
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
    Place,
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
    Surroundings,
    TcpSection,
    TlsSection,
    is_name,
)
from frelay.config.route_files import RouteFileEdit
from frelay.config.rules import (
    WrittenRoute,
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
    """Read the route file at ``path``, and the files of its ``routes_dir``: as they would be with ``edit``, if given.

    Relative paths in it start from ``base``, by default from the file's own directory.

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
    """The good ones among the sections of the route file at ``path``, without its routes; None if it cannot be read.

    It is for those who look at the files that the sections name, where :func:`load` has refused the whole.
    """
    main = read_document(Path(path).absolute(), [])
    if main is None:
        return None
    around = Surroundings(base or main.path.parent)
    return Config(
        path=main.path,
        relay=_section(main, "relay", RelaySection, around) or RelaySection(),
        tls=_section(main, "tls", TlsSection, around),
        tcp=_section(main, "tcp", TcpSection, around) or TcpSection(),
    )


def route_files(directory: Path) -> tuple[Path, ...]:
    """The files of a ``routes_dir`` that hold routes, sorted: ``*.toml``, hidden ones left out.

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

    relay = _section(main, "relay", RelaySection, Surroundings(base))
    tls = _section(main, "tls", TlsSection, Surroundings(base))
    limits = _section(main, "limits", Limits, Surroundings(base)) or Limits()
    tcp = _section(main, "tcp", TcpSection, Surroundings(base)) or TcpSection()
    groups = _groups(main, Surroundings(base))
    around = Surroundings(base, groups)
    admin = _section(main, "admin", AdminSection, around)
    metrics = _section(main, "metrics", MetricsSection, around)

    files = [main.path]
    written = [WrittenRoute(main, place, table) for place, table in _tables(main, "route")]
    routes_dir = _routes_dir(main, relay, base)
    written += _routes_of_directory(main, routes_dir, files, edit)
    routes: list[tuple[WrittenRoute, RouteTable]] = []
    for route in written:
        check_keys_together(route)
        table = _validated(route.document, route.place, route.table, RouteTable, around)
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
    document: Document, place: Place, table: dict[str, Any], model: type[SectionType], around: Surroundings
) -> SectionType | None:
    """``table`` as a ``model``, or None after reporting all that is wrong with it."""
    try:
        return model.model_validate(table, context=around)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            document.report((*place, *found["loc"]), explain(found, model))
        return None


def _section(main: Document, name: str, model: type[SectionType], around: Surroundings) -> SectionType | None:
    """The section ``[name]``, or None if it is absent or was reported."""
    if name not in main.table:
        return None
    table = main.table[name]
    if not isinstance(table, dict):
        main.report((name,), f"must be a table: write [{name}], in single brackets, and its keys below it")
        return None
    return _validated(main, (name,), table, model, around)


def _tables(main: Document, name: str) -> list[tuple[Place, dict[str, Any]]]:
    """The tables of ``[[name]]`` with their places."""
    written = main.table.get(name, [])
    if not isinstance(written, list):
        main.report((name,), f"must be a list of tables: write [[{name}]], in double brackets")
        return []
    tables: list[tuple[Place, dict[str, Any]]] = []
    for index, table in enumerate(written):
        if isinstance(table, dict):
            tables.append(((name, index), table))
        else:
            main.report((name, index), f"must be a table, not {shown(table)}: write [[{name}]] and its keys below it")
    return tables


def _groups(main: Document, around: Surroundings) -> dict[str, tuple[Selector, ...]]:
    groups: dict[str, tuple[Selector, ...]] = {}
    first: dict[str, Place] = {}
    for place, table in _tables(main, "group"):
        group = _validated(main, place, table, GroupTable, around)
        name = table.get("name")
        if not is_name(name):
            continue
        if name in first:
            taken = main.where((*first[name], "name"))
            main.report((*place, "name"), f'there is a group "{name}" already, at {taken}')
            continue
        first[name] = place
        # A group with a mistake in it is still a known one: the routes that name it have nothing to mend.
        groups[name] = () if group is None else group.parties
    return groups


# --- routes_dir ------------------------------------------------------------------------------------------------


def _routes_dir(main: Document, relay: RelaySection | None, base: Path) -> Path | None:
    """Where more routes are: as written, or ``routes.d`` beside the file; None if what is written is no path."""
    default = base / "routes.d"
    if relay is not None:
        return relay.routes_dir or default
    section = main.table.get("relay")
    if not isinstance(section, dict) or "routes_dir" not in section:
        return default
    try:
        # Another key of [relay] was wrong; the routes can be judged all the same.
        only = RelaySection.model_validate({"routes_dir": section["routes_dir"]}, context=Surroundings(base))
    except ValidationError:
        return None
    return only.routes_dir


def _routes_of_directory(
    main: Document, directory: Path | None, files: list[Path], edit: RouteFileEdit | None
) -> list[WrittenRoute]:
    """The routes of ``routes_dir``, one a file; the files go to ``files``, problems to where those of ``main`` go."""
    if directory is None:
        return []
    try:
        paths = set(route_files(directory))
    except OSError as error:
        main.report(("relay", "routes_dir"), f"cannot be listed: {error.strerror}: {directory}")
        return []
    if edit is not None:
        paths = paths - {edit.path} if edit.content is None else paths | {edit.path}
    routes: list[WrittenRoute] = []
    for path in sorted(paths):
        files.append(path)
        if edit is not None and path == edit.path and edit.content is not None:
            document = parse_document(path, edit.content, main.problems)
        else:
            # It may be gone: the admin API deletes routes at any time, also between the listing and this.
            document = read_document(path, main.problems, may_be_gone=True)
        if document is None:
            continue
        if "route" in document.table:
            document.report(("route",), "cannot stand here: such a file holds the keys of one route, without [[route]]")
            continue
        route = WrittenRoute(document, (), document.table)
        routes.append(route)
        if route.name is not None and route.name != path.stem:
            route.report("name", f"must be the file's own name, {shown(path.stem)}: rename one of the two")
    return routes
