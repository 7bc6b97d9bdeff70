"""The operator's commands: the options and help text of each. They ask a running relay through its admin API.

Each command takes :class:`~frelay.cli.admin_options.AdminOptions` and its own options, and returns its exit code.
(``frelay plan --running FILE`` alone needs no relay.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from frelay.cli.admin_options import OPTION_NAMES, AdminOptions, asks_relay

__all__ = ["app"]

app: Final = typer.Typer()
route_app: Final = typer.Typer(name="route", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(route_app, help="Add, delete and show routes of a running relay.")


def _route_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """For the completion of a shell: the names of the routes of the relay that the options given so far find."""
    given = {name: ctx.params.get(name) for name in OPTION_NAMES}
    try:
        found = AdminOptions(**given).client(timeout=1.0).get("/v1/routes")
        return [route["name"] for route in found["routes"] if route["name"].startswith(incomplete)]
    except Exception:
        return []  # a completion must not print an error message


Json = Annotated[bool, typer.Option("--json", help="Print the API's answer as one JSON object.")]
RouteName = Annotated[
    str, typer.Argument(help="The route.", metavar="NAME", autocompletion=_route_names, show_default=False)
]
IfMatch = Annotated[
    str | None,
    typer.Option("--if-match", help="Only if the route still has this etag; `route show` prints it.", metavar="ETAG"),
]
Seconds = Annotated[float | None, typer.Option(metavar="SECONDS", help="As in a [[route]].")]
Number = Annotated[int | None, typer.Option(metavar="NUMBER", help="As in a [[route]].")]


# --- the relay as a whole -------------------------------------------------------------------------------------------


@app.command()
@asks_relay()
def status(options: AdminOptions, as_json: Json = False) -> int:
    """Show the state of a running relay: what needs attention, how long certificates last, who was refused.

    --json prints the object of GET /v1/status.
    """
    from frelay.cli.status import status

    return status(options.client(), as_json=as_json)


@app.command()
@asks_relay()
def reload(options: AdminOptions, as_json: Json = False) -> int:
    """Make a running relay read its files again. Prints what changed; or every problem, with exit code 1.

    --json prints the object of POST /v1/reload: kept (a number), added, removed, replaced (names), restart_only
    (settings); or, with exit code 1, the API's error: error, message, problems.
    """
    from frelay.cli.status import reload

    return reload(options.client(), as_json=as_json)


@app.command()
@asks_relay("The new route file, relay.toml by default; its [admin] says where the relay is.")
def plan(
    options: AdminOptions,
    running: Annotated[
        Path | None,
        typer.Option("--running", help="Compare with this file instead of asking a relay.", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
) -> int:
    """Show what a reload with a new route file would change, and which pairings it would end. Changes nothing.

    The new file is read as if it stood in place of the running one: its relative paths start from that directory. The
    relay is looked for at the new file's own admin.listen, then at that of FRELAY_CONFIG, or of relay.toml in the
    current directory; --admin names another one.
    Exit codes: 0 the relay would accept the file, 1 it would refuse it, 2 usage.

    --json prints ok, problems (as `check --json`), changes (whether there are any), running (where from), keep, add,
    remove, replace (routes: name, listen, and as far as known pairings, waiting, changed), bind, close (addresses),
    clashes (bind, close), settings, restart_only (key, from, to). `changed` lists key, from, to.
    """
    from frelay.cli.plan import plan

    return plan(options, running=running, as_json=as_json)


@app.command()
@asks_relay()
def top(
    options: AdminOptions,
    interval: Annotated[float, typer.Option(help="Seconds between two snapshots.", metavar="SECONDS", min=0.1)] = 1.0,
    snapshots: Annotated[
        int | None, typer.Option("--count", help="Print this many snapshots, and end.", metavar="NUMBER", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each snapshot as one JSON object a line.")] = False,
) -> int:
    """Watch a running relay: routes, who waits, pairings and their bytes a second, who was refused. Press ? for help.

    If stdout is no terminal, or with --count or --json, it prints snapshots (one by default) and ends. The first
    comes after one interval, since a rate is the difference of two snapshots.

    --json prints at (seconds since the epoch) and error, which is null or why there was no answer; if it is null,
    also status, routes and pairings as the API gives them, and rates: routes by name and pairings by id, each with
    func1_to_func2 and func2_to_func1 in bytes a second.
    """
    from frelay.cli.top import top

    return top(options.client(timeout=5.0), interval=interval, count=snapshots, as_json=as_json)


# --- routes -----------------------------------------------------------------------------------------------------------


@route_app.command("add")
@asks_relay()
def add_route(
    options: AdminOptions,
    name: RouteName,
    listen: Annotated[
        list[str],
        typer.Option(
            help="The address that its functions dial; port 0 takes any free one; may be repeated.", metavar="HOST:PORT"
        ),
    ],
    func1: Annotated[
        list[str] | None,
        typer.Option(
            help="Who the first party is: dns:NAME, uri:URI, spki:sha256:HEX, group:NAME; may be repeated. "
            "Or dial:HOST:PORT, dial:unix:PATH.",
            metavar="SELECTOR",
        ),
    ] = None,
    func2: Annotated[list[str] | None, typer.Option(help="Likewise for the second party.", metavar="SELECTOR")] = None,
    func1_dial: Annotated[
        str | None,
        typer.Option(help="The relay dials the first party, here: HOST:PORT or unix:PATH.", metavar="ADDRESS"),
    ] = None,
    func2_dial: Annotated[str | None, typer.Option(help="Likewise for the second party.", metavar="ADDRESS")] = None,
    dial_timeout: Annotated[
        float | None, typer.Option(help="How long dialling that party may take.", metavar="SECONDS")
    ] = None,
    outer: Annotated[str | None, typer.Option(help="mtls, or none with --allow-from.", metavar="WORD")] = None,
    allow_from: Annotated[
        list[str] | None,
        typer.Option(help="A network from which functions may connect; may be repeated.", metavar="NETWORK"),
    ] = None,
    proxy_protocol: Annotated[
        list[str] | None,
        typer.Option(help="A network of load balancers that send a PROXY header; may be repeated.", metavar="NETWORK"),
    ] = None,
    handoff: Annotated[str | None, typer.Option(help="close-notify or hello.", metavar="WORD")] = None,
    require_inner_tls: Annotated[str | None, typer.Option(help="true, false or always.", metavar="WORD")] = None,
    hello_settle: Seconds = None,
    ticket_timeout: Seconds = None,
    wait_timeout: Seconds = None,
    half_close_timeout: Seconds = None,
    idle_timeout: Seconds = None,
    stall_timeout: Seconds = None,
    max_waiting_per_party: Number = None,
    max_waiting_per_meet: Number = None,
    max_waiting_by_meet: Number = None,
    max_pairings: Number = None,
    replace: Annotated[
        bool, typer.Option("--replace/--new", help="Replace a route of this name (default), or fail if there is one.")
    ] = True,
    if_match: IfMatch = None,
    as_json: Json = False,
) -> int:
    """Add a route, or replace it. When this returns, the route listens and is on disk. Doing it twice changes nothing.

    Options that are not given have the values of [limits], or their defaults.

    --json prints the object of PUT
    /v1/routes/NAME, which is that of `route show`.
    """
    from frelay.cli import routes
    from frelay.cli.admin_client import UsageError

    try:
        parties = {
            "func1": routes.party(func1 or [], func1_dial, dial_timeout),
            "func2": routes.party(func2 or [], func2_dial, dial_timeout),
        }
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--func1, --func2") from None
    if not replace and if_match is not None:
        raise UsageError("--new is for a route that is not there, --if-match for one that is: use one of them")
    body = {
        "listen": listen[0] if len(listen) == 1 else listen,
        **parties,
        "outer": outer,
        "allow_from": allow_from or None,
        "proxy_protocol": proxy_protocol or None,
        "handoff": handoff,
        "require_inner_tls": {"true": True, "false": False}.get(require_inner_tls or "", require_inner_tls),
        "hello_settle": hello_settle,
        "ticket_timeout": ticket_timeout,
        "wait_timeout": wait_timeout,
        "half_close_timeout": half_close_timeout,
        "idle_timeout": idle_timeout,
        "stall_timeout": stall_timeout,
        "max_waiting_per_party": max_waiting_per_party,
        "max_waiting_per_meet": max_waiting_per_meet,
        "max_waiting_by_meet": max_waiting_by_meet,
        "max_pairings": max_pairings,
    }
    given = {key: value for key, value in body.items() if value is not None}
    return routes.add(options.client(), name, given, must_be_new=not replace, if_match=if_match, as_json=as_json)


@route_app.command("delete")
@asks_relay()
def delete_route(options: AdminOptions, name: RouteName, if_match: IfMatch = None) -> int:
    """Delete a route that `route add` made. When this returns, its port is free and its file is deleted.

    Waiting functions are told; running pairings may go on for drain_timeout.
    """
    from frelay.cli import routes

    return routes.delete(options.client(), name, if_match=if_match)


@route_app.command("list")
@asks_relay()
def list_routes(options: AdminOptions, as_json: Json = False) -> int:
    """List the routes that are in force, with who waits on each and how many bytes went through.

    --json prints the object of GET /v1/routes: routes, a list of what `route show --json` prints.
    """
    from frelay.cli import routes

    return routes.listing(options.client(), as_json=as_json)


@route_app.command("show")
@asks_relay()
def show_route(options: AdminOptions, name: RouteName, as_json: Json = False) -> int:
    """Show one route: the values of its keys, who waits, how its pairings ended, and its etag.

    --json prints the object of GET /v1/routes/NAME.
    """
    from frelay.cli import routes

    return routes.show(options.client(), name, as_json=as_json)
