"""The options that every operator's command shares: they find the admin API of a relay.

:func:`asks_relay` adds them to a command, and prints one message where the relay cannot be reached or refuses.

Only typer is imported at the top, since this module is loaded for every ``frelay --help``.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, ParamSpec

import typer

if TYPE_CHECKING:
    from frelay.cli.admin_client import AdminClient, CallFailed

__all__ = ["OPTION_NAMES", "AdminOptions", "asks_relay"]

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class AdminOptions:
    """The options that find a relay's admin API, as the user gave them."""

    admin: str | None = None
    config: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    server_name: str | None = None

    def client(self, *, timeout: float | None = None) -> AdminClient:
        """A client of the relay's API, not connected yet; raises UsageError, CallFailed and CertificateError."""
        from frelay.cli.admin_client import AdminClient, Credentials, find_admin_address

        credentials = Credentials(self.cert, self.key, self.ca, self.server_name)
        return AdminClient(find_admin_address(self.admin, self.config), credentials, timeout=timeout)


OPTION_NAMES: Final = tuple(field.name for field in fields(AdminOptions))


def _typer_options(config_help: str) -> dict[str, Any]:
    """For each field of :class:`AdminOptions`, the option that typer reads it from."""
    return {
        "admin": Annotated[
            str | None,
            typer.Option(
                "--admin",
                help="Where the relay's API is: unix:PATH, HOST:PORT or https://HOST:PORT. Also: FRELAY_ADMIN.",
                metavar="ADDRESS",
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
            typer.Option(
                "--ca",
                help="The CA of the relay's certificate, for an API on TCP.",
                metavar="FILE",
                envvar="FRELAY_ADMIN_CA",
            ),
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


def asks_relay(
    config_help: str = "The route file whose [admin] says where the relay is.",
) -> Callable[[Callable[Concatenate[AdminOptions, P], int]], Callable[..., None]]:
    """Make a typer command of a function: add the options of :class:`AdminOptions`, and print its errors."""

    def decorate(command: Callable[Concatenate[AdminOptions, P], int]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            from frelay.cli.admin_client import CallFailed, UsageError
            from frelay.cli.text import loose_output

            options = AdminOptions(**{name: given.pop(name) for name in OPTION_NAMES})
            loose_output()
            try:
                code = command(options, **given)  # type: ignore[call-arg]  # by typer, from the signature below
            except UsageError as error:
                raise typer.BadParameter(str(error)) from None
            except CallFailed as error:
                _tell(error, as_json=given.get("as_json") is True)
                code = 1
            raise typer.Exit(code)

        shared = _typer_options(config_help)
        own = inspect.signature(command, eval_str=True)
        _, *parameters = own.parameters.values()
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters] + [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in shared.items()
        ]
        # Typer reads a command's options from these two.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _tell(error: CallFailed, *, as_json: bool) -> None:
    """Print what went wrong: for a program the API's answer on stdout, for a person a message on stderr."""
    if as_json and error.body is not None:
        print(json.dumps(error.body))
        return
    print(f"frelay: {error.message}", file=sys.stderr)
    for line in error.details:
        print(f"  {line}", file=sys.stderr)
