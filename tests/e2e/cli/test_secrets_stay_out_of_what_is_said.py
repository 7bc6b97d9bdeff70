"""A private key in the wrong place is never repeated: not in an error, an answer of the API, a repr or the log.

If an operator mixes up two lines of a route file, or gives a function a key instead of the name of its file, only that
must be corrected: no new key is needed, since the old one is in no log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import BaseModel

import frelay
from frelay.cli.check import as_json_object
from frelay.client.options import JoinPlan, Options
from frelay.config.document import ARRAYS, SECTIONS
from frelay.config.load import load
from frelay.errors import CertificateError, ConfigError
from frelay.pki.authority import Authority
from frelay.relay.prepare import prepare
from support.admin import ADMIN, ROUTE, admin
from support.clients import options
from support.commands import frelay_command
from support.site import DEMO, Site

# No output may have a piece of a secret that is this long: 24 characters of base64 are 18 bytes.
_PIECE: Final = 24
_RSA: Final = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PEM: Final = _RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def body(pem: str) -> str:
    return "".join(line for line in pem.splitlines() if not line.startswith("-----"))


def assert_says_nothing_of(pem: str, text: str) -> None:
    # Line ends may be escaped, left out, or replaced.
    told = "".join(text.replace("\\n", "").split())
    secret = body(pem)
    assert len(secret) > 100
    found = {secret[at : at + _PIECE] for at in range(len(secret) - _PIECE + 1)}
    assert not [piece for piece in found if piece in told], text


def test_a_piece_of_a_key_would_be_found() -> None:
    """Otherwise the tests below would prove nothing."""
    for text in (PEM, repr(PEM), json.dumps({"a": PEM}), f"not {PEM[:60]!r}..."):
        with pytest.raises(AssertionError):
            assert_says_nothing_of(PEM, text)


# --- the route file ---------------------------------------------------------------------------------------------------


def places() -> Iterator[tuple[str, str]]:
    """Every key that a route file can have, with the header of its table."""
    for name, model in SECTIONS.items():
        yield from ((f"[{name}]", key) for key in model.model_fields)
    for name, model in ARRAYS.items():
        yield from ((f"[[{name}]]", key) for key in model.model_fields)


def problems_of(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        prepare(load(path))
    return caught.value


def all_that_is_said(error: ConfigError) -> str:
    return str(error) + repr(error) + json.dumps([as_json_object(problem) for problem in error.problems])


@pytest.mark.parametrize(("header", "key"), list(places()))
def test_pasted_into_the_route_file(tmp_path: Path, header: str, key: str) -> None:
    """As text, in a list and in a table; where text is expected, and where it is not."""
    path = tmp_path / "relay.toml"
    text = json.dumps(PEM)  # which TOML reads as well
    for value in (text, f"[{text}]", f"{{ dial = {text} }}", f"{{ {text} = 1 }}", json.dumps(PEM.replace("\n", ""))):
        path.write_text(f"{header}\n{key} = {value}\n")
        assert_says_nothing_of(PEM, all_that_is_said(problems_of(path)))


def test_pasted_as_it_is(tmp_path: Path) -> None:
    """It is no TOML at all, or text over several lines, or in place of a name."""
    path = tmp_path / "relay.toml"
    for text in (PEM, f"[tls]\nprivate_key = {PEM}", f"[tls]\nprivate_key = '''{PEM}'''", f"[{json.dumps(PEM)}]\n"):
        path.write_text(text)
        assert_says_nothing_of(PEM, all_that_is_said(problems_of(path)))


# --- the relay's own files --------------------------------------------------------------------------------------------


def broken_keys() -> dict[str, bytes]:
    encrypted = _RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"passphrase"))
    pem = PEM.encode()
    return {
        "of another certificate": pem,
        "encrypted": encrypted,
        "cut short": pem[:-200],
        "of another kind": pem.replace(b"PRIVATE KEY", b"CERTIFICATE"),
        "damaged": pem[:400] + b"!" + pem[400:],
        "in one line": pem.replace(b"\n", b" "),
    }


@pytest.mark.parametrize("what", broken_keys())
@pytest.mark.parametrize("where", ["certificate", "private_key", "client_ca", "crl"])
def test_a_key_in_the_wrong_file(site: Site, what: str, where: str) -> None:
    site.ca.write_crl(site.directory, site.ca.crl())
    config = load(site.write(crl=True))
    assert config.tls is not None
    Path(getattr(config.tls, where)).write_bytes(broken_keys()[what])
    error = problems_of(site.config)
    assert f"tls.{where}" in {problem.key for problem in error.problems}
    assert_says_nothing_of(PEM, all_that_is_said(error))
    assert_says_nothing_of(broken_keys()["encrypted"].decode(), all_that_is_said(error))


# --- what is shown of objects -----------------------------------------------------------------------------------------


def parts(thing: Any, depth: int = 6) -> Iterator[Any]:
    """An object of ours, and all objects inside it."""
    yield thing
    if depth == 0:
        return
    if isinstance(thing, BaseModel):
        inner = [getattr(thing, name) for name in type(thing).model_fields]
    elif is_dataclass(thing) and not isinstance(thing, type):
        inner = [getattr(thing, field.name) for field in fields(thing)]
    elif isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, list | tuple):
        inner = list(thing)
    else:
        return
    for one in inner:
        yield from parts(one, depth - 1)


def test_no_repr_shows_a_key(site: Site) -> None:
    """Of the configuration, the relay's certificates, an authority, what it issues, and a function's plan."""
    config = load(site.write())
    authority = Authority.create("CA")
    issued = authority.issue(common_name="func1", dns=["func1.demo"], usage="party")
    plan = JoinPlan.make("127.0.0.1:9001", **options(site, "func1", "func2"))
    keys = [site.relay_paths[1].read_text(), site.paths["func1"][1].read_text()]
    for made in (authority, issued):
        der = made.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        keys.append(der.decode())
    seen = [part for thing in (config, prepare(config), authority, issued, plan) for part in parts(thing)]
    assert len(seen) > 50
    for part in seen:
        for key in keys:
            assert_says_nothing_of(key, f"{part!r}{part}")
            # Also not the secret number itself, which some reprs show.
            number = load_pem_private_key(key.encode(), None).private_numbers().private_value  # type: ignore[union-attr]
            assert str(number) not in f"{part!r}"


# --- a function -------------------------------------------------------------------------------------------------------

CHANGES: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    **{
        name: (lambda name=name: {name: PEM})  # type: ignore[misc]
        for name in (
            *("cert", "key", "ca", "inner_cert", "inner_key", "inner_ca", "server_name"),
            *("peer", "route", "party", "mode", "proxy", "traceparent", "wait", "retry"),
        )
    },
    "a list of peers": lambda: {"peer": ["dns:a", PEM]},
    "alpn": lambda: {"alpn": [PEM]},
    "key in bytes": lambda: {"key": PEM.encode()},
}


@pytest.mark.parametrize("what", CHANGES)
def test_pasted_into_an_argument(site: Site, what: str) -> None:
    """For example, a platform gives a secret as an environment variable and not as a file."""
    given: Any = {**options(site, "func1", "func2"), "wait": 0.01, **CHANGES[what]()}
    with pytest.raises(Exception) as caught:  # noqa: PT011  whatever it is, it must not repeat the key
        frelay.connect("127.0.0.1:1", **given)
    error: BaseException | None = caught.value
    while error is not None:
        assert_says_nothing_of(PEM, f"{error!r} {error}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_pasted_as_the_address(site: Site) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        frelay.connect(PEM, **options(site, "func1", "func2"))
    assert_says_nothing_of(PEM, str(caught.value))


@pytest.mark.parametrize("what", broken_keys())
@pytest.mark.parametrize("where", ["cert", "key", "ca"])
def test_a_functions_key_in_the_wrong_file(site: Site, tmp_path: Path, what: str, where: str) -> None:
    given: Options = options(site, "func1", "func2")
    path = tmp_path / "wrong.pem"
    path.write_bytes(broken_keys()[what])
    given[where] = path  # type: ignore[literal-required]
    with pytest.raises(CertificateError) as caught:
        frelay.connect("127.0.0.1:1", **given)
    assert str(path) in str(caught.value)
    for pem in (PEM, broken_keys()["encrypted"].decode()):
        assert_says_nothing_of(pem, f"{caught.value!r}")


def test_the_command_given_a_key_for_its_file(site: Site) -> None:
    """For example by FRELAY_KEY."""
    cert, _ = site.paths["func1"]
    said = frelay_command(
        *("connect", "127.0.0.1:1", "--cert", cert, "--ca", site.ca_path, "--peer", "dns:func2.demo"),
        env={"FRELAY_KEY": PEM},
    )
    assert said.code == 2
    assert "key: this is PEM text; write it into a file, and name that file here" in said.stderr
    assert_says_nothing_of(PEM, said.stderr)


# --- the API ----------------------------------------------------------------------------------------------------------


async def test_pasted_into_the_api(site: Site) -> None:
    """In every key of a route, as its name, and as the whole body: not in the answer, and not in the log."""
    options_ = ("--log-level", "debug")
    async with site.process(DEMO, sections=ADMIN, options=options_) as relay, admin(site) as api:
        answers = []
        for key in (*ROUTE, *ARRAYS["route"].model_fields, "no-such-key", PEM):
            for value in (PEM, [PEM], {"dial": PEM}, {PEM: 1}):
                answers.append(await api.put("/v1/routes/two", json={**ROUTE, key: value}))
        answers.append(await api.put("/v1/routes/two", content=PEM, headers={"content-type": "application/json"}))
        answers.append(await api.put(f"/v1/routes/{quote(PEM, safe='')}", json=ROUTE))
        assert not [answer for answer in answers if answer.is_success]
        for answer in answers:
            assert_says_nothing_of(PEM, answer.text)
        for path in ("/v1/status", "/v1/routes"):
            assert_says_nothing_of(PEM, (await api.get(path)).text)
        site.write(DEMO.replace("dns:func1.demo", PEM.replace("\n", "\\n")), sections=ADMIN)
        await relay.log("reload refused, the old configuration stays")
        assert_says_nothing_of(PEM, (await api.get("/v1/status")).text)
    assert_says_nothing_of(PEM, relay.stderr)
