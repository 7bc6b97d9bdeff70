"""The operator's commands: what each takes. All but some plans ask a running relay, by its admin API.

What is common to them stands here once: the options that find the relay, and what happens when it cannot be asked or
says no. A command is a function of :class:`Asked` and its own options, and gives its exit code.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, ParamSpec

import typer

if TYPE_CHECKING:
    from frelay.cli.admin_client import CallFailed, Remote

__all__ = ["app"]

app: Final = typer.Typer()
route_app: Final = typer.Typer(name="route", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(route_app, help="Add, delete and show routes of a running relay.")

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Asked:
    """The options that find a relay, as they were given."""

    admin: str | None = None
    config: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    server_name: str | None = None

    def remote(self, *, timeout: float | None = None) -> Remote:
        """The relay's API, not called yet; raises BadPlace, CallFailed and CertificateError."""
        from frelay.cli.admin_client import Credentials, Remote, find

        credentials = Credentials(self.cert, self.key, self.ca, self.server_name)
        return Remote(find(self.admin, self.config), credentials, timeout=timeout)


def _options(config_help: str) -> dict[str, Any]:
    """The options of :class:`Asked` by the names of its fields."""
    return {
        "admin": Annotated[
            str | None,
            typer.Option(
                "--admin",
                help="Where the relay's API is: unix:PATH, HOST:PORT or https://HOST:PORT. Also: FRELAY_ADMIN.",
                metavar="PLACE",
            ),
        ],
        "config": Annotated[
            Path | None,
            typer.Option("--config", "-c", help=f"{config_help} Also: FRELAY_CONFIG.", metavar="FILE"),
        ],
        "cert": Annotated[
            Path | None,
            typer.Option(
                "--cert", help="Your certificate, for an API on TCP.", metavar="FILE", envvar="FRELAY_ADMIN_CERT"
            ),
        ],
        "key": Annotated[
            Path | None,
            typer.Option(
                "--key", help="Its key, if --cert does not hold it.", metavar="FILE", envvar="FRELAY_ADMIN_KEY"
            ),
        ],
        "ca": Annotated[
            Path | None,
            typer.Option("--ca", help="Who vouches for the relay, on TCP.", metavar="FILE", envvar="FRELAY_ADMIN_CA"),
        ],
        "server_name": Annotated[
            str | None,
            typer.Option(
                "--server-name",
                help="The name in the relay's certificate, if it is not HOST.",
                metavar="NAME",
                envvar="FRELAY_ADMIN_SERVER_NAME",
            ),
        ],
    }


def _asks_relay(
    config_help: str = "The route file whose [admin] leads to the relay.",
) -> Callable[[Callable[Concatenate[Asked, P], int]], Callable[..., None]]:
    """Make a typer command of a function: with the options of :class:`Asked` after its own, and with its messages."""

    def decorate(command: Callable[Concatenate[Asked, P], int]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            from frelay.cli.admin_client import BadPlace, CallFailed
            from frelay.cli.text import loose_output

            asked = Asked(**{name: given.pop(name) for name in options})
            loose_output()
            try:
                code = command(asked, **given)  # type: ignore[call-arg]  # by typer, from the signature below
            except BadPlace as error:
                raise typer.BadParameter(str(error)) from None
            except CallFailed as error:
                _tell(error, as_json=given.get("as_json") is True)
                code = 1
            raise typer.Exit(code)

        options = _options(config_help)
        own = inspect.signature(command, eval_str=True)
        _, *parameters = own.parameters.values()
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters] + [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in options.items()
        ]
        # What typer reads a command's options from.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _tell(error: CallFailed, *, as_json: bool) -> None:
    """Say what went wrong: the API's own words on stdout for a program, or a message for a person."""
    if as_json and error.body is not None:
        print(json.dumps(error.body))
        return
    print(f"frelay: {error.message}", file=sys.stderr)
    for line in error.details:
        print(f"  {line}", file=sys.stderr)


def _route_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """For the completion of a shell: the routes of the relay that the options so far lead to."""
    given = {name: ctx.params.get(name) for name in _options("")}
    try:
        found = Asked(**given).remote(timeout=1.0).get("/v1/routes")
        return [route["name"] for route in found["routes"] if route["name"].startswith(incomplete)]
    except Exception:
        return []  # whoever presses Tab has asked for no message


Json = Annotated[bool, typer.Option("--json", help="Print the API's answer as one JSON object.")]
RouteName = Annotated[
    str, typer.Argument(help="The route.", metavar="NAME", autocompletion=_route_names, show_default=False)
]
IfMatch = Annotated[
    str | None,
    typer.Option("--if-match", help="Only if its etag, as `route show` tells it, is still this one.", metavar="ETAG"),
]
Seconds = Annotated[float | None, typer.Option(metavar="SECONDS", help="As in a [[route]].")]
Number = Annotated[int | None, typer.Option(metavar="NUMBER", help="As in a [[route]].")]


# --- the relay as a whole -------------------------------------------------------------------------------------------


@app.command()
@_asks_relay()
def status(asked: Asked, as_json: Json = False) -> int:
    """Say how a running relay is: what needs attention, how long certificates last, who was refused.

    --json prints the object of GET /v1/status.
    """
    from frelay.cli.status import status

    return status(asked.remote(), as_json=as_json)


@app.command()
@_asks_relay()
def reload(asked: Asked, as_json: Json = False) -> int:
    """Have a running relay read its files again. Prints what changed, or every problem, with exit code 1.

    --json prints the object of POST /v1/reload: kept (a number), added, removed, replaced (names), restart_only
    (settings); or, with exit code 1, the API's error: error, message, problems.
    """
    from frelay.cli.status import reload

    return reload(asked.remote(), as_json=as_json)


@app.command()
@_asks_relay("The new route file, relay.toml by default; its [admin] leads to the relay.")
def plan(
    asked: Asked,
    running: Annotated[
        Path | None,
        typer.Option("--running", help="Compare with this file instead of asking a relay.", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
) -> int:
    """Say what a reload with a new route file would change, and whom it would hit. Changes nothing.

    Relative paths in the new file start from where the running one is, which it is to replace. Where no relay is at the
    new file's own admin.listen, it is looked for by FRELAY_CONFIG, or relay.toml here; or say which with --admin.
    Exit codes: 0 a relay would take it over, 1 it would refuse, 2 usage.

    --json prints ok, problems (as `check --json`), changes (whether there are any), running (where from), keep, add,
    remove, replace (routes: name, listen, and as far as known pairings, waiting, changed), bind, close (addresses),
    clashes (bind, close), settings, restart_only (key, from, to). `changed` lists key, from, to.
    """
    from frelay.cli.plan import plan

    return plan(asked, running=running, as_json=as_json)


@app.command()
@_asks_relay()
def top(
    asked: Asked,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", metavar="SECONDS", min=0.1)] = 1.0,
    looks: Annotated[
        int | None, typer.Option("--count", help="Print this many snapshots, and end.", metavar="NUMBER", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each snapshot as one JSON object a line.")] = False,
) -> int:
    """Watch a running relay: routes, who waits, pairings and their bytes a second, who was refused. `?` is help.

    Where stdout is no terminal, or with --count or --json, it prints snapshots (one by default) and ends. The first
    comes after one interval, since rates need two looks.

    --json prints at (seconds since the epoch) and error, which is null or why there was no answer; in the first case
    also status, routes and pairings as the API tells them, and rates: routes by name and pairings by id, each with
    func1_to_func2 and func2_to_func1 in bytes a second.
    """
    from frelay.cli.top import top

    return top(asked.remote(timeout=5.0), interval=interval, count=looks, as_json=as_json)


# --- routes -----------------------------------------------------------------------------------------------------------


@route_app.command("add")
@_asks_relay()
def add_route(
    asked: Asked,
    name: RouteName,
    listen: Annotated[
        list[str],
        typer.Option(help="Where its functions dial; port 0 for any; may be repeated.", metavar="HOST:PORT"),
    ],
    func1: Annotated[
        list[str] | None,
        typer.Option(
            help="Who the first party is: dns:NAME, uri:URI, spki:sha256:HEX, group:NAME; may be repeated. "
            "Or dial:HOST:PORT, dial:unix:PATH.",
            metavar="SELECTOR",
        ),
    ] = None,
    func2: Annotated[list[str] | None, typer.Option(help="Likewise the second.", metavar="SELECTOR")] = None,
    func1_dial: Annotated[
        str | None, typer.Option(help="Dial it there instead: HOST:PORT or unix:PATH.", metavar="PLACE")
    ] = None,
    func2_dial: Annotated[
        str | None, typer.Option(help="Dial it there instead: HOST:PORT or unix:PATH.", metavar="PLACE")
    ] = None,
    dial_timeout: Annotated[float | None, typer.Option(help="Time to reach it.", metavar="SECONDS")] = None,
    outer: Annotated[str | None, typer.Option(help="mtls, or none with --allow-from.", metavar="WORD")] = None,
    allow_from: Annotated[
        list[str] | None, typer.Option(help="A network that may call; may be repeated.", metavar="NETWORK")
    ] = None,
    proxy_protocol: Annotated[
        list[str] | None,
        typer.Option(help="A network of balancers that send a PROXY header; may be repeated.", metavar="NETWORK"),
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
    max_pairings: Number = None,
    replace: Annotated[
        bool, typer.Option("--replace/--new", help="Whether there may be a route of this name already.")
    ] = True,
    if_match: IfMatch = None,
    as_json: Json = False,
) -> int:
    """Add a route, or replace it: it listens, and is on disk, when this is done. Doing it twice changes nothing.

    What is not given is as in [limits] and by default. --json prints the object of PUT /v1/routes/NAME, which is that
    of `route show`.
    """
    from frelay.cli import routes
    from frelay.cli.admin_client import BadPlace

    try:
        parties = {
            "func1": routes.party(func1 or [], func1_dial, dial_timeout),
            "func2": routes.party(func2 or [], func2_dial, dial_timeout),
        }
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--func1, --func2") from None
    if not replace and if_match is not None:
        raise BadPlace("--new is for a route that is not there, --if-match for one that is")
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
        "max_pairings": max_pairings,
    }
    given = {key: value for key, value in body.items() if value is not None}
    return routes.add(asked.remote(), name, given, must_be_new=not replace, if_match=if_match, as_json=as_json)


@route_app.command("delete")
@_asks_relay()
def delete_route(asked: Asked, name: RouteName, if_match: IfMatch = None) -> int:
    """Delete a route that `route add` made: its port is free, and its file gone, when this is done.

    Functions that wait are told; pairings get until drain_timeout.
    """
    from frelay.cli import routes

    return routes.delete(asked.remote(), name, if_match=if_match)


@route_app.command("list")
@_asks_relay()
def list_routes(asked: Asked, as_json: Json = False) -> int:
    """List the routes in force, with who waits there and what goes through.

    --json prints the object of GET /v1/routes: routes, a list of what `route show --json` prints.
    """
    from frelay.cli import routes

    return routes.listing(asked.remote(), as_json=as_json)


@route_app.command("show")
@_asks_relay()
def show_route(asked: Asked, name: RouteName, as_json: Json = False) -> int:
    """Show one route: its keys with their values in force, who waits, how pairings ended, and its etag.

    --json prints the object of GET /v1/routes/NAME.
    """
    from frelay.cli import routes

    return routes.show(asked.remote(), name, as_json=as_json)
