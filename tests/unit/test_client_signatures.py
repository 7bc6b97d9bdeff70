"""``Options`` is the one list of connect's arguments: the clients, the command and the docs must match it."""

from __future__ import annotations

import asyncio
import inspect
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_type_hints

import pytest
import trio
import typer

import frelay
from frelay.cli.app import app
from frelay.client.options import JoinPlan, Options, RequiredOptions
from frelay.client.retry import Retry

FUNCTIONS: Final = Path(__file__).parents[2] / "docs" / "functions.md"
CONNECTS: Final[dict[str, Callable[..., Any]]] = {
    "blocking": frelay.connect,
    "trio": frelay.client.trio.connect,
    "asyncio": frelay.client.asyncio.connect,
}


LISTENS: Final[dict[str, Callable[..., Any]]] = {
    "blocking": frelay.listen,
    "trio": frelay.client.trio.listen,
    "asyncio": frelay.client.asyncio.start_server,
}


def arguments(connect: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: one for name, one in inspect.signature(connect).parameters.items() if name != "limit"}


@pytest.mark.parametrize("client", CONNECTS)
def test_all_clients_take_the_same(client: str) -> None:
    """Names, order, defaults and types; asyncio's ``limit`` is its reader's."""
    found = arguments(CONNECTS[client])
    assert list(found.values()) == list(arguments(frelay.connect).values())
    assert set(found) == {"address", *Options.__annotations__}
    required = {name for name, one in found.items() if one.default is inspect.Parameter.empty}
    assert required == {"address", "cert", "ca", "peer"} == {"address", *RequiredOptions.__annotations__}
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for name, one in found.items() if name != "address")


def test_the_types_are_those_of_the_list() -> None:
    hints = get_type_hints(frelay.connect)
    assert {name: hints[name] for name in Options.__annotations__} == get_type_hints(Options)


def test_all_defaults_but_one_are_none() -> None:
    defaults = {
        name: one.default
        for name, one in arguments(frelay.connect).items()
        if one.default not in (None, inspect.Parameter.empty)
    }
    assert defaults == {"mode": "handoff"}


@pytest.mark.parametrize("client", CONNECTS)
def test_a_wrong_name_or_a_missing_one_is_a_type_error(client: str) -> None:
    connect = CONNECTS[client]

    async def call(**given: Any) -> None:
        found = connect("localhost:1", **given)
        if inspect.isawaitable(found):
            await found

    run = asyncio.run if client == "asyncio" else lambda running: trio.run(lambda: running)
    for given in ({"cert": "a", "ca": "b"}, {"cert": "a", "ca": "b", "peer": "dns:a.demo", "patience": 3}):
        with pytest.raises(TypeError, match=r"connect\(\) .*'(peer|patience)'"):
            run(call(**given))


def test_each_argument_reaches_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocking client passes them on one by one; the others pass all of them on as they are."""
    seen: dict[str, Any] = {}

    class Seen(Exception):
        pass

    def make(address: str, **options: Any) -> None:
        seen.update(options, address=address)
        raise Seen

    monkeypatch.setattr(JoinPlan, "make", make)
    given: dict[str, Any] = {name: object() for name in ("address", *Options.__annotations__)}
    with pytest.raises(Seen):
        frelay.connect(**given)
    assert seen == given


def test_its_docstring_describes_each() -> None:
    text = inspect.getdoc(frelay.connect) or ""
    described = text.partition("Args:")[2].partition("Raises:")[0]
    for name in ("address", *Options.__annotations__):
        assert re.search(rf"^    {name}: |``{name}``", described, re.MULTILINE), name


@pytest.mark.parametrize("client", LISTENS)
def test_listeners_take_the_same_and_two_more(client: str) -> None:
    """asyncio's server takes the callback first, as asyncio's own does."""
    found = arguments(LISTENS[client])
    more = {"standing": 2, "on_error": None}
    assert {name: found.pop(name).default for name in more} == more
    assert found.pop("client_connected_cb", None) is None or client == "asyncio"
    assert list(found.values()) == list(arguments(frelay.connect).values())
    text = inspect.getdoc(frelay.listen) or ""
    for name in ("wait", "retry", *more):
        assert re.search(rf"^    {name}: ", text, re.MULTILINE), name
        assert any(f"`{name}`" in row[0] for row in table_below("They take all arguments of `connect`")), name


# --- the command ------------------------------------------------------------------------------------------------------

# Arguments that the command does not have, and options that only the command has.
NOT_OF_THE_COMMAND: Final = {"on_status"}
ONLY_OF_THE_COMMAND: Final = {"address", "listen", "to", "exec_", "concurrency", "quiet", "as_json"}


def parameters_of_the_command() -> dict[str, Any]:
    connect = typer.main.get_command(app).commands["connect"]  # type: ignore[attr-defined]
    return {one.name: one for one in connect.params if one.name != "help"}


def test_the_command_has_an_option_for_each() -> None:
    found = parameters_of_the_command()
    assert set(found) - ONLY_OF_THE_COMMAND == set(Options.__annotations__) - NOT_OF_THE_COMMAND
    for name in set(found) - {"address", "exec_", "as_json"}:
        assert found[name].opts[0] == f"--{name.replace('_', '-')}"
    assert all(one.envvar.startswith("FRELAY_") for one in found.values())
    assert {name for name, one in found.items() if one.required} == {"address", *RequiredOptions.__annotations__}
    assert found["mode"].default == arguments(frelay.connect)["mode"].default


def test_each_option_reaches_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def connect_command(address: str, options: dict[str, Any], *_: Any, **__: Any) -> int:
        seen.update(options)
        return 0

    monkeypatch.setattr("frelay.cli.connect.command.connect_command", connect_command)
    values = {"wait": "7.5", "party": "func1", "mode": "tunnel", "retry": "3"}
    expected: dict[str, Any] = {"wait": 7.5, "retry": 3}
    line = ["connect", "relay.demo:9001"]
    for name in sorted(set(Options.__annotations__) - NOT_OF_THE_COMMAND):
        value = values.get(name, f"a {name}")
        line += [f"--{name.replace('_', '-')}", value]
        expected.setdefault(name, [value] if name in ("peer", "alpn", "partner") else value)
    with pytest.raises(SystemExit) as ended:
        app(line)
    assert ended.value.code == 0
    assert {name: value if isinstance(value, (list, int, float)) else str(value) for name, value in seen.items()} == (
        expected
    )


# --- what the docs and help() show ------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CONNECTS)
def test_help_shows_them(client: str) -> None:
    text = pydoc.plain(pydoc.render_doc(CONNECTS[client]))
    head = text.partition("Join a route")[0]
    for name in Options.__annotations__:
        assert re.search(rf"\b{name}: ", head), name
    assert "options" not in head


def table_below(heading: str) -> list[list[str]]:
    """The cells of the first table below a line of docs/functions.md, without its head."""
    lines = FUNCTIONS.read_text().partition(heading)[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_docs_name_them_all() -> None:
    named = [name for row in table_below("answer = wire.recv(65536)\n```") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(Options.__annotations__)


def test_each_error_of_the_docs_can_be_caught_by_its_name() -> None:
    names = {re.match(r"`(\w+)", row[0]) for row in table_below("## What each error means")}
    found = {match[1] for match in names if match}
    assert {"Refused", "CertificateError", "CertificateRefused", "ValueError"} <= found
    for name in found - {"ValueError"}:
        assert issubclass(getattr(frelay, name), frelay.FrelayError)
        assert name in frelay.__all__


def test_each_name_of_the_docs_is_there() -> None:
    """``frelay.client.trio.connect`` and all else that is written with its module."""
    text = FUNCTIONS.read_text()
    # As code: called, or between backticks. A host's name may begin so, too.
    names = set(re.findall(r"(?<![\w./])frelay((?:\.[A-Za-z_]+)+)(?=[(`])", text))
    assert {".connect", ".client.trio.connect", ".client.asyncio.connect", ".Retry", ".FrelayError"} <= names
    for name in names:
        found: object = frelay
        for part in name[1:].split("."):
            found = getattr(found, part)
    assert frelay.Retry is Retry


@pytest.mark.parametrize("name", ["trio", "asyncio"])
def test_a_client_is_an_attribute_without_an_import_of_its_own(name: str) -> None:
    """In a fresh interpreter, where nobody has imported it before."""
    code = f"import frelay, sys; assert 'trio' not in sys.modules; print(frelay.client.{name}.connect.__name__)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("connect\n", "")
