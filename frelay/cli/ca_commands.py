"""``frelay ca``: the options and help text of each command. ``ca_issue`` and ``ca_show`` do the work.

Only typer is imported at the top, since this module is loaded for every ``frelay --help``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import typer

__all__ = ["app"]

app: Final = typer.Typer(
    name="ca",
    help="A certificate authority for a relay and its functions.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Algorithm = Annotated[str, typer.Option(help="p256 or ed25519.", metavar="KIND")]
Authority = Annotated[
    Path | None,
    typer.Option(
        "--ca", help="The directory of ca.pem and ca.key; by default the current one, or certs in it.", metavar="DIR"
    ),
]
Dns = Annotated[list[str] | None, typer.Option("--dns", help="A DNS name; may be repeated.", metavar="NAME")]
Uri = Annotated[
    list[str] | None, typer.Option("--uri", help="A URI, such as a SPIFFE ID; may be repeated.", metavar="URI")
]
Ip = Annotated[list[str] | None, typer.Option("--ip", help="An IP address; may be repeated.", metavar="ADDRESS")]
Days = Annotated[
    int | None,
    typer.Option(
        help="How long it is valid; by default 825 days, but not longer than the authority.", metavar="DAYS", min=1
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="The directory to write to; by default that of the authority.", metavar="DIR")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]


@app.command()
def init(
    directory: Annotated[
        Path, typer.Argument(help="The directory to write to; made if it does not exist.", metavar="DIR")
    ],
    name: Annotated[str, typer.Option(help="The authority's name, for people.", metavar="NAME")] = "frelay CA",
    days: Annotated[
        int, typer.Option(help="How long it and its first revocation list are valid.", metavar="DAYS", min=1)
    ] = 3650,
    algorithm: Algorithm = "p256",
    force: Force = False,
) -> None:
    """Make an authority: ca.pem to give to all, ca.key to keep secret, and crl.pem, on which nobody is revoked yet."""
    from frelay.cli.ca_issue import create_authority

    create_authority(directory, name=name, days=days, algorithm=_algorithm(algorithm), force=force)


@app.command()
def relay(
    name: Annotated[str, typer.Argument(help="The name of the files.", metavar="NAME")] = "relay",
    ca: Authority = None,
    dns: Dns = None,
    uri: Uri = None,
    ip: Ip = None,
    days: Days = None,
    algorithm: Algorithm = "p256",
    out: Out = None,
    force: Force = False,
) -> None:
    """Issue a relay's certificate: for a TLS server, with the names and addresses that functions dial."""
    from frelay.cli.ca_issue import Names, issue

    if not (dns or ip):
        raise typer.BadParameter(
            "a relay needs a name or an address that functions dial: they verify it by that",
            param_hint="--dns or --ip",
        )
    names = Names(dns or (), uri or (), ip or ())
    issue(ca, name, "relay", names, days=days, algorithm=_algorithm(algorithm), out=out, force=force)


@app.command()
def party(
    name: Annotated[str, typer.Argument(help="The name of the files, for people.", metavar="NAME")],
    ca: Authority = None,
    dns: Dns = None,
    uri: Uri = None,
    ip: Ip = None,
    days: Days = None,
    algorithm: Algorithm = "p256",
    out: Out = None,
    force: Force = False,
) -> None:
    """Issue a function's certificate: for a client of the relay, and for both sides of the TLS with the other one.

    NAME is no identity: a route matches the names given with --dns and --uri.
    """
    from frelay.cli.ca_issue import Names, issue

    if not (dns or uri):
        raise typer.BadParameter(
            "a party needs a name that a route can match; an address is never an identity", param_hint="--dns or --uri"
        )
    names = Names(dns or (), uri or (), ip or ())
    issue(ca, name, "party", names, days=days, algorithm=_algorithm(algorithm), out=out, force=force)


@app.command()
def revoke(
    given: Annotated[
        list[str] | None,
        typer.Argument(
            help="Certificates, or their serial numbers in hex; without one the list is only renewed.",
            metavar="CERT...",
        ),
    ] = None,
    ca: Authority = None,
    days: Annotated[
        int | None,
        typer.Option(help="How long the list is valid; by default as long as the last one was.", metavar="DAYS", min=1),
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Revoke nobody, only renew the list.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Begin a list if there is none.")] = False,
) -> None:
    """Put certificates on the revocation list crl.pem, or renew it. No entry is ever removed from the list."""
    from frelay.cli.ca_issue import revoke as revoke_all

    if renew and given:
        raise typer.BadParameter("--renew revokes nobody: leave it out, or the certificates", param_hint="--renew")
    revoke_all(ca, given or [], days=days, is_new=new)


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(help="Certificates, CRLs or keys.", metavar="FILE...")],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="Also show which routes of this route file a certificate fits.", metavar="FILE"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as one JSON object.")] = False,
) -> None:
    """Print what certificates and CRLs say; of a private key only its kind."""
    from frelay.cli.ca_show import show_files

    raise typer.Exit(show_files(files, config, as_json=as_json))


def _algorithm(text: str) -> Literal["p256", "ed25519"]:
    if text == "p256":
        return "p256"
    if text == "ed25519":
        return "ed25519"
    raise typer.BadParameter("write p256 or ed25519", param_hint="--algorithm")
