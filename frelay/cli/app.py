"""The command line: the options and help text of each command.

Exit codes: 0 done, 1 failed or invalid configuration, 2 usage. Data goes to stdout, messages to stderr. Each command
imports what it needs inside its function, so that ``frelay --help`` does not load a relay.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from frelay import __version__
from frelay.cli import admin_commands, ca_commands
from frelay.errors import CertificateError, ConfigError, FrelayError, printable

__all__ = ["app", "main"]

app: Final = typer.Typer(
    name="frelay",
    help="A relay that two functions dial. It verifies and pairs them; then they speak end-to-end mTLS.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(ca_commands.app)
app.add_typer(admin_commands.app)

ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="The route file.", metavar="FILE", envvar="FRELAY_CONFIG")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"frelay {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: ConfigFile = Path("relay.toml"),
    log_format: Annotated[str, typer.Option(help="console or json.", metavar="FORMAT")] = "console",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.", metavar="LEVEL")] = "info",
    watch: Annotated[bool, typer.Option(help="Reload when a file of the configuration changes.")] = True,
) -> None:
    """Run the relay. SIGHUP reloads, SIGTERM drains, a second SIGTERM stops now."""
    import signal

    # The relay handles SIGHUP while it runs. Before and after that it would kill the process, and with it the exit code
    # of a clean drain. First of all, because to load the relay takes most of a second.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    from frelay.relay.logging import LEVELS

    if log_format not in ("console", "json"):
        raise typer.BadParameter("write console or json", param_hint="--log-format")
    if log_level not in LEVELS:
        raise typer.BadParameter(f"write one of {', '.join(LEVELS)}", param_hint="--log-level")

    from frelay.relay.run import run as run_relay

    as_json = log_format == "json"
    code = run_relay(config, watch_files=watch, log_format="json" if as_json else "console", log_level=log_level)
    raise typer.Exit(code)


@app.command()
def check(
    config: ConfigFile = Path("relay.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Check a route file and the files that it names, and print every problem. Binds no address.

    What is no error but would keep functions out is a warning, on stderr.

    --json prints ok, problems (file, line, key, message) and, if ok, warnings (likewise), routes (names), addresses,
    certificate_not_after and crl_next_update (times as text, or null).
    """
    from frelay.cli.check import check_file

    raise typer.Exit(check_file(config, as_json=as_json))


@app.command()
def init(
    directory: Annotated[
        Path, typer.Argument(help="The directory to write to; made if it does not exist.", metavar="DIR")
    ],
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
) -> None:
    """Write a CA, certificates for a relay and two functions, and a relay.toml that runs as it is."""
    from frelay.cli.init import write_all

    write_all(directory, force=force)


@app.command()
def why(
    certificate: Annotated[
        Path,
        typer.Option("--cert", help="The certificate, followed by its intermediates if there are any.", metavar="FILE"),
    ],
    config: ConfigFile = Path("relay.toml"),
    route: Annotated[str | None, typer.Option(help="Check for this route only.", metavar="NAME")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as one JSON object.")] = False,
) -> None:
    """Show why a relay admits or refuses a certificate: every check in order. Needs no running relay and no key.

    Exit codes: 0 admitted (to the route given, or to any), 1 refused, 2 usage.
    """
    from frelay.cli.why import explain

    raise typer.Exit(explain(config, certificate, route, as_json=as_json))


@app.command()
def demo() -> None:
    """Run a relay and two functions on loopback, and print how they join, are handed off, and exchange bytes."""
    from frelay.cli.demo import run_demo

    raise typer.Exit(run_demo())


@app.command()
def connect(
    address: Annotated[
        str, typer.Argument(help="The address of the relay.", metavar="HOST:PORT", envvar="FRELAY_ADDRESS")
    ],
    cert: Annotated[Path, typer.Option(help="This function's certificate.", metavar="FILE", envvar="FRELAY_CERT")],
    ca: Annotated[
        Path, typer.Option(help="The CAs that issue the relay's certificate.", metavar="FILE", envvar="FRELAY_CA")
    ],
    peer: Annotated[
        list[str],
        typer.Option(
            help="The name that the other function must have, e.g. dns:func2.acme; of several, one of them.",
            envvar="FRELAY_PEER",
        ),
    ],
    key: Annotated[
        Path | None,
        typer.Option(help="The key of --cert, if that file does not hold it.", metavar="FILE", envvar="FRELAY_KEY"),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            help="Listen at this port, or at unix:PATH: each connection becomes a pairing.",
            metavar="HOST:PORT",
            envvar="FRELAY_LISTEN",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="Dial this service, or unix:PATH, for each pairing.", metavar="HOST:PORT", envvar="FRELAY_TO"
        ),
    ] = None,
    exec_: Annotated[
        str | None,
        typer.Option(
            "--exec",
            help="Run this command; its input and output are one pairing.",
            metavar="COMMAND",
            envvar="FRELAY_EXEC",
        ),
    ] = None,
    route: Annotated[
        str | None, typer.Option(help="The route, if several share the address.", envvar="FRELAY_ROUTE")
    ] = None,
    party: Annotated[
        str | None, typer.Option(help="func1 or func2, if the certificate fits both.", envvar="FRELAY_PARTY")
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option(help="The name in the relay's certificate, if it is not HOST.", envvar="FRELAY_SERVER_NAME"),
    ] = None,
    wait: Annotated[
        float | None, typer.Option(help="Seconds for joining and waiting together.", envvar="FRELAY_WAIT", min=0.001)
    ] = None,
    mode: Annotated[str, typer.Option(help="handoff, ticket or tunnel.", envvar="FRELAY_MODE")] = "handoff",
    inner_cert: Annotated[
        Path | None,
        typer.Option(
            help="The certificate for the other function, if it is not --cert.",
            metavar="FILE",
            envvar="FRELAY_INNER_CERT",
        ),
    ] = None,
    inner_key: Annotated[
        Path | None, typer.Option(help="The key of --inner-cert.", metavar="FILE", envvar="FRELAY_INNER_KEY")
    ] = None,
    inner_ca: Annotated[
        Path | None,
        typer.Option(
            help="The CAs that issue the other function's certificate, if not --ca.",
            metavar="FILE",
            envvar="FRELAY_INNER_CA",
        ),
    ] = None,
    alpn: Annotated[
        list[str] | None,
        typer.Option(help="An application protocol to agree on with the other function.", envvar="FRELAY_ALPN"),
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(
            help="The HTTP proxy, http://HOST:PORT; '' for none. Without it HTTPS_PROXY and NO_PROXY count.",
            metavar="URL",
            envvar="FRELAY_PROXY",
        ),
    ] = None,
    retry: Annotated[
        str | None,
        typer.Option(help="Join again after failures that may pass: a number, or 'always'.", envvar="FRELAY_RETRY"),
    ] = None,
    traceparent: Annotated[
        str | None,
        typer.Option(help="A W3C trace context, for the relay's log.", envvar="FRELAY_TRACEPARENT"),
    ] = None,
    meet: Annotated[
        str | None,
        typer.Option(
            help="Pair only with a function that joins with this key, too.", metavar="KEY", envvar="FRELAY_MEET"
        ),
    ] = None,
    partner: Annotated[
        list[str] | None,
        typer.Option(
            help="With --meet: the name that the relay must find in the other function's certificate; repeatable.",
            metavar="SELECTOR",
            envvar="FRELAY_PARTNER",
        ),
    ] = None,
    concurrency: Annotated[
        int,
        typer.Option(help="With --to: how many pairings at once.", metavar="N", envvar="FRELAY_CONCURRENCY", min=1),
    ] = 64,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Report only failures.", envvar="FRELAY_QUIET")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Report each step on stderr as one JSON line.", envvar="FRELAY_JSON")
    ] = False,
) -> None:
    """Join a route, and use the wire to the other function as standard input and output, or as a local port.

    Exit codes: 0 clean end, 1 failed, 2 usage, 3 refused by the relay, 4 nobody came.
    """
    from frelay.cli.connect.command import LocalOptions, connect_command
    from frelay.client.options import Options

    if party not in (None, "func1", "func2"):
        raise typer.BadParameter("write func1 or func2", param_hint="--party")
    if mode not in ("handoff", "ticket", "tunnel"):
        raise typer.BadParameter("write handoff, ticket or tunnel", param_hint="--mode")
    if sum(value is not None for value in (listen, to, exec_)) > 1:
        raise typer.BadParameter("only one of --listen, --to and --exec can be used", param_hint="--listen")
    if retry is not None and retry != "always" and not (retry.isascii() and retry.isdigit()):
        raise typer.BadParameter("write a number of tries, or always", param_hint="--retry")
    options = Options(
        cert=cert,
        key=key,
        ca=ca,
        peer=peer,
        wait=wait,
        route=route,
        party=party,  # type: ignore[typeddict-item]  # checked above
        server_name=server_name,
        inner_cert=inner_cert,
        inner_key=inner_key,
        inner_ca=inner_ca,
        alpn=alpn,
        mode=mode,  # type: ignore[typeddict-item]  # checked above
        proxy=proxy,
        retry=None if retry is None else True if retry == "always" else int(retry),
        traceparent=traceparent,
        meet=meet,
        partner=partner or None,
    )
    try:
        code = connect_command(
            address,
            options,
            LocalOptions(listen, to, exec_, concurrency),
            as_json=as_json,
            is_quiet=quiet,
            always=retry == "always",
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(code)


def main() -> None:
    """The console script: our errors print one message for each problem and exit with 1, without a traceback."""
    # Makes --show-completion and --install-completion take the name of a shell, as the build of a package needs. By
    # itself typer takes the shell that it finds among our parent processes. It has no other switch for this.
    os.environ.setdefault("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    try:
        # Without the name, usage messages under `python -m frelay` would not say "frelay".
        app(prog_name="frelay")
    except ConfigError as error:
        for problem in error.problems:
            print(f"frelay: {problem}", file=sys.stderr)
        sys.exit(1)
    except (FrelayError, CertificateError) as error:
        print(f"frelay: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
