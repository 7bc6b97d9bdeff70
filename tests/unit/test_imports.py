"""The order of the rooms: an import runs to the right only, and each foreign library is known to few rooms.

One list holds the whole order. A reader of one room needs no room to the left of it, a function needs the standard
library alone, and a change of the TLS or configuration library stays in its rooms. Imports inside functions and under
``TYPE_CHECKING`` count, and so do literal arguments of ``import_module``.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

import frelay

PACKAGE: Final = Path(frelay.__file__).parent


@dataclass(frozen=True)
class Room:
    """A package of frelay or a module beside them, and the foreign libraries that it may import."""

    name: str
    outside: str
    why: str


# A room imports itself and the rooms below it in this list.
ROOMS: Final = (
    Room("cli", "typer trio", "the commands; no other room knows that somebody typed them"),
    Room("relay", "trio structlog", "the life of one relay, alone or with worker processes"),
    Room("admin", "fastapi starlette h11 pydantic prometheus_client trio structlog", "HTTP for operators"),
    Room("joining", "trio structlog", "from accept to matched"),
    Room("pairing", "trio structlog", "from matched to closed"),
    Room("tls", "trio OpenSSL cryptography", "outer TLS, the border to OpenSSL"),
    Room("client", "", "the side of a function: pip install --no-deps frelay is all that it needs"),
    Room("net", "trio structlog", "the border to the kernel"),
    Room("pki", "cryptography", "makes certificates and revocation lists"),
    Room("config", "pydantic", "the route file, without TLS, sockets or Trio"),
    Room("journal", "", "what happened, for the log, the metrics and the API"),
    Room("protocol", "", "the wire contract, without I/O"),
    Room("errors", "", "the errors that all rooms share"),
)
ORDER: Final = [room.name for room in ROOMS]
BY_NAME: Final = {room.name: room for room in ROOMS}
LOOSE: Final = ("__init__", "__main__", "errors", "journal")

# Some rooms may import less than the order permits.
ONLY: Final = {
    "client": "client net.tcp protocol errors",
    "pki": "pki protocol errors",
}
# Foreign libraries that one module or package of a room may import, and the rest of it may not.
ALSO_OUTSIDE: Final = {
    "client.trio": "trio",
    "config.watch": "trio watchfiles",
    "config.route_files": "tomli_w",
    "joining.explain": "cryptography",
}
# The package itself names the client and the errors, and loads the client on demand.
DOORS: Final = ("frelay", "frelay.__main__")


# What the names on PyPI are called in an import statement.
DISTRIBUTIONS: Final = {"prometheus-client": "prometheus_client", "pyopenssl": "OpenSSL", "tomli-w": "tomli_w"}


@dataclass(frozen=True)
class Import:
    """One imported module, and where it is written."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules() -> dict[str, Path]:
    """All modules of the package by their dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(node: ast.AST, importer: str, known: frozenset[str]) -> list[str]:
    """The modules that one node of a syntax tree imports, by their full names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{importer}:{node.lineno}: a relative import does not say where it leads"
        base = node.module or ""
        # `from frelay.protocol import messages` names a module; `from frelay import __version__` does not.
        return [full if (full := f"{base}.{alias.name}") in known else base for alias in node.names]
    if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(("import_module", "__import__")):
        return []
    return [name.value for name in node.args[:1] if isinstance(name, ast.Constant) and isinstance(name.value, str)]


def imports(importer: str, source: str, known: frozenset[str]) -> Iterator[Import]:
    """What ``source`` imports: frelay's modules by their full names, others by the first part of theirs."""
    for node in ast.walk(ast.parse(source)):
        for name in imported_names(node, importer, known):
            top = name.partition(".")[0]
            yield Import(importer, name if top == "frelay" else top, getattr(node, "lineno", 0))


@cache
def all_imports() -> tuple[Import, ...]:
    found = modules()
    known = frozenset(found)
    return tuple(one for name, path in found.items() for one in imports(name, path.read_text(), known))


def room_of(module: str) -> str:
    """The room of one of frelay's modules; empty for the package itself and ``__main__``."""
    name = module.removeprefix("frelay").removeprefix(".").partition(".")[0]
    return "" if name == "__main__" else name


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "frelay"


def is_within(module: str, places: str) -> bool:
    """Whether ``module`` is one of ``places`` (without "frelay."), or lies in one of them."""
    return any(f"{module}.".startswith(f"frelay.{place}.") for place in places.split())


def breaks_the_rule(one: Import) -> bool:
    room = room_of(one.importer)
    if not is_ours(one.imported):
        also = [libraries for place, libraries in ALSO_OUTSIDE.items() if is_within(one.importer, place)]
        allowed = " ".join([BY_NAME[room].outside, *also]).split()
        return one.imported not in sys.stdlib_module_names and one.imported not in allowed
    if one.imported == "frelay":
        return False  # it imports the errors, and the client on demand
    if room in ONLY and not is_within(one.imported, ONLY[room]):
        return True
    other = room_of(one.imported)
    return other not in BY_NAME or ORDER.index(other) < ORDER.index(room)


# --- the list itself --------------------------------------------------------------------------------------------------


def test_every_module_is_in_a_room() -> None:
    homeless = [name for name in modules() if name not in DOORS and room_of(name) not in BY_NAME]
    assert not homeless


def test_the_package_has_these_rooms_and_few_loose_modules() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == set(ORDER) - {"journal", "errors"}
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(LOOSE)
    assert all(room.why for room in ROOMS)


# --- the order --------------------------------------------------------------------------------------------------------


def test_imports_run_to_the_right() -> None:
    broken = [str(one) for one in all_imports() if one.importer not in DOORS and breaks_the_rule(one)]
    assert not broken, "\n".join(broken)


def test_the_architecture_page_has_the_same_rooms() -> None:
    page = (PACKAGE.parent / "docs/architecture.md").read_text("utf-8")
    assert f"\n{' > '.join(ORDER)}\n" in page
    assert re.findall(r"^\*\*`(\w+)/?`\*\*", page, re.MULTILINE) == ORDER


def test_no_circle_among_modules() -> None:
    """Not under ``TYPE_CHECKING`` and not inside a function either."""
    graph: dict[str, set[str]] = {name: set() for name in modules() if name not in DOORS}
    for one in all_imports():
        if one.importer in graph and one.imported in graph:
            graph[one.importer].add(one.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" > ".join(reversed(error.args[1])))


def test_a_function_needs_the_standard_library_only() -> None:
    """Everything that ``frelay.client`` reaches, by any way."""
    graph: dict[str, list[Import]] = {}
    for one in all_imports():
        graph.setdefault(one.importer, []).append(one)
    reached, ahead = set(), ["frelay.client.blocking", "frelay.client.asyncio"]
    while ahead:
        module = ahead.pop()
        reached.add(module)
        for one in graph.get(module, []):
            assert is_ours(one.imported) or one.imported in sys.stdlib_module_names, str(one)
            if is_ours(one.imported) and one.imported not in reached:
                ahead.append(one.imported)
    assert {"frelay.client.wire", "frelay.protocol.session", "frelay.errors"} <= reached


def test_the_package_and_its_main_import_little() -> None:
    ours = {name: {one.imported for one in all_imports() if one.importer == name} for name in DOORS}
    client = {
        "frelay.client",
        "frelay.client.blocking",
        "frelay.client.group.blocking",
        "frelay.client.listening",
        "frelay.client.retry",
        "frelay.client.wire",
    }
    assert {name for name in ours["frelay"] if is_ours(name)} == {"frelay.errors", *client}
    assert {name for name in ours["frelay.__main__"] if is_ours(name)} == {"frelay.cli.app", "frelay.client.installed"}


def test_what_is_imported_is_declared() -> None:
    """Not only there because something else brought it along."""
    pyproject = PACKAGE.parent / "pyproject.toml"
    if not pyproject.exists():
        pytest.skip("this is an installed copy")
    declared = {
        DISTRIBUTIONS.get(name, name)
        for text in tomllib.loads(pyproject.read_text())["project"]["dependencies"]
        for name in [text.split(">")[0].split("=")[0].split("[")[0].strip()]
    }
    foreign = {one.imported for one in all_imports() if not is_ours(one.imported)} - set(sys.stdlib_module_names)
    assert foreign <= declared


# --- the test of the test ---------------------------------------------------------------------------------------------

SAMPLE: Final = """
from __future__ import annotations
import os.path, trio
from typing import TYPE_CHECKING
from frelay import __version__, journal
if TYPE_CHECKING:
    from frelay.relay.relay import Relay
else:
    import pydantic
def later():
    try:
        from frelay.tls import context
    except ImportError:
        import OpenSSL.SSL
    return importlib.import_module("frelay.joining.lobby"), import_module(later)
"""


def test_the_reader_of_imports_misses_none() -> None:
    known = frozenset({"frelay", "frelay.journal", "frelay.tls.context"})
    found = {one.imported for one in imports("frelay.pairing.pump", SAMPLE, known)}
    assert found == {
        *("__future__", "os", "trio", "typing", "frelay", "frelay.journal"),
        *("frelay.relay.relay", "pydantic", "frelay.tls.context", "OpenSSL", "frelay.joining.lobby"),
    }


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("frelay.protocol.frames", "trio"),
        ("frelay.protocol.frames", "frelay.config.model"),
        ("frelay.errors", "frelay.protocol.outcome"),
        ("frelay.client.wire", "cryptography"),
        ("frelay.client.wire", "trio"),
        ("frelay.client.blocking", "frelay.net.sockets"),
        ("frelay.client.blocking", "frelay.config.address"),
        ("frelay.pki.authority", "frelay.config.load"),
        ("frelay.config.load", "OpenSSL"),
        ("frelay.config.plan", "trio"),
        ("frelay.config.load", "frelay.tls.context"),
        ("frelay.joining.legs", "OpenSSL"),
        ("frelay.pairing.pump", "frelay.joining.legs"),
        ("frelay.relay.relay", "frelay.cli.app"),
        ("frelay.relay.relay", "fastapi"),
        ("frelay.tls.stream", "frelay.relay.relay"),
        ("frelay.net.slots", "frelay.pairing.leg"),
        ("frelay.joining.lobby", "frelay.nowhere"),
    ],
)
def test_the_rule_forbids(importer: str, imported: str) -> None:
    assert breaks_the_rule(Import(importer, imported, 1))


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("frelay.protocol.frames", "json"),
        ("frelay.protocol.messages", "frelay.protocol.frames"),
        ("frelay.config.watch", "watchfiles"),
        ("frelay.client.wire", "frelay.net.tcp"),
        ("frelay.client.trio", "trio"),
        ("frelay.cli.app", "frelay.relay.relay"),
        ("frelay.cli.demo_function", "frelay"),
        ("frelay.tls.context", "OpenSSL"),
    ],
)
def test_the_rule_allows(importer: str, imported: str) -> None:
    assert not breaks_the_rule(Import(importer, imported, 1))
