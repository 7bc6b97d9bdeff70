"""The house stays a house: imports run right or down only, and each foreign library is known to few rooms.

DESIGN's picture, as a table. Somebody who opens one room must not need the rooms above it to understand it, a function
must be able to run on the standard library alone, and a change of TLS or configuration library must not go through
every file. What is imported under ``TYPE_CHECKING`` is not imported, and is not looked at.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

import frelay

PACKAGE: Final = Path(frelay.__file__).parent


@dataclass(frozen=True)
class Room:
    """A module or a package of frelay: what it may import besides the standard library and itself, and why so."""

    name: str
    rooms: str
    outside: str
    why: str


LEAVES: Final = "errors outcome tcp protocol"

# From the ground up. A room may only name rooms that stand above it in this list, which lie below it in the house.
HOUSE: Final = (
    # The leaves: importable by all, importing the standard library and each other only. They run inside functions.
    Room("errors", "", "", "who is at fault is a type that everybody shares"),
    Room("outcome", "", "", "the vocabulary of the log, the metrics and the API"),
    Room("tcp", "", "", "both ends of a leg ask the kernel the same questions"),
    Room("key_mode", "", "", "who may read a key is one rule, for all that read one"),
    Room("protocol", "errors", "", "sans-I/O, for the relay and for every client"),
    # Beside the way: what the command line uses and no part of the relay does.
    Room("client", "errors tcp protocol", "", "pip install --no-deps frelay serves a function"),
    Room("client.trio", "errors tcp protocol client", "trio", "the one client that needs a library, and says so"),
    Room("pki", "errors key_mode protocol", "cryptography", "makes certificates; a relay only reads them"),
    Room("log", "", "structlog", "only whoever starts a process says how it logs"),
    Room("journal", "errors outcome protocol", "", "the log, the metrics and the API learn the same facts"),
    Room("shares", "", "", "who holds how much of anything: legs, pairings, connections"),
    Room("lag", "", "trio", "how late a loop is, whatever runs in it"),
    # The way of one connection, from its last station to its first.
    Room("config.store", "", "tomli_w", "what the admin API writes, and no reader of a route file needs to"),
    Room(
        "config",
        "errors protocol config.store",
        "pydantic",
        "a file is judged without TLS, without sockets and without Trio",
    ),
    Room("choice", "protocol config", "", "the relay and `frelay why` must never choose differently"),
    Room("config.watch", "errors protocol config", "trio watchfiles", "the one part of it that waits"),
    Room("names", "", "trio", "whoever looks a name up waits for nobody else's"),
    Room("strangers", "config shares", "trio", "who gives way to whom, whatever a connection is"),
    Room("admission", "config shares strangers", "trio", "limits, for connections of every kind"),
    Room("privileges", "errors key_mode config", "", "what a process may do is settled before it is a relay"),
    Room("binding", "config", "trio structlog", "where a name or a wildcard listens, for all that listen"),
    Room("unix", "", "trio", "what Unix sockets do that TCP does not"),
    Room("sockets", "errors tcp config", "trio", "the border to the kernel: its errors end here"),
    Room("systemd", "config binding sockets", "trio structlog sdnotify", "who started us, wherever that is systemd"),
    Room("tls", "errors key_mode tcp protocol config sockets", "trio OpenSSL cryptography", "the border to OpenSSL"),
    Room("verdict", "protocol config choice tls", "", "why a certificate is let in or not, for whoever asks offline"),
    Room("refusals", "journal", "trio structlog", "of a flood so much that it can be read"),
    Room("doubts", "errors protocol config tls", "", "what keeps functions out, for who checks a file and who runs it"),
    Room("tickets", "admission sockets", "trio", "who brings one brings a leg, whatever that is"),
    Room("opening", "errors protocol tcp tickets", "trio", "the first bytes, while nothing is read or spent"),
    Room("leg", f"{LEAVES} admission sockets tls tickets", "trio", "one party's connection, hand-off included"),
    Room("frameless", f"{LEAVES} shares admission sockets tls leg", "trio", "legs that speak no frames"),
    Room(
        "lobby", "errors protocol shares", "trio", "who waits; it only holds legs, and knows nothing of how they work"
    ),
    Room("charges", "protocol config", "", "who holds what of a route, decided from its configuration"),
    Room("bandwidth", "", "trio", "a budget, whoever spends it"),
    Room("pump", "outcome", "", "one direction, whatever the two ends are, and how it can end"),
    Room("raw_pump", "outcome pump sockets tcp", "trio", "between sockets; the kernel moves the bytes"),
    Room("readiness", "pump raw_pump tcp", "trio structlog", "steps pumps without knowing what a pairing is"),
    Room(
        "stream_pump",
        "errors outcome bandwidth pump readiness sockets tcp",
        "trio",
        "the bytes pass through the process",
    ),
    Room(
        "pairing",
        f"{LEAVES} shares leg bandwidth pump raw_pump stream_pump readiness sockets",
        "trio structlog",
        "two legs, and how they ended",
    ),
    Room(
        "route",
        f"{LEAVES} config choice shares charges tls leg lobby bandwidth pairing",
        "trio",
        "the one decision: who meets whom",
    ),
    Room(
        "dial",
        f"{LEAVES} journal config admission sockets unix leg frameless lobby pairing route",
        "trio structlog",
        "the one place where the relay opens a connection",
    ),
    Room(
        "reception",
        f"{LEAVES} journal config choice strangers admission sockets tls refusals tickets opening leg frameless lobby "
        "pairing route dial",
        "trio structlog",
        "from accept to paired or gone",
    ),
    Room("inspection", "outcome protocol tls lobby route", "trio structlog", "judges again who is in"),
    Room("listener", f"{LEAVES} config admission binding sockets reception", "trio structlog", "one address"),
    Room(
        "admin",
        "errors outcome protocol journal lag sockets tls",
        "fastapi starlette h11 pydantic prometheus_client trio structlog",
        "what an operator sees and changes; it asks an Office, and does not know whose",
    ),
    Room(
        "in_force",
        "errors outcome protocol journal config choice admission binding tls lobby pairing route inspection listener "
        "systemd",
        "trio",
        "one configuration and what was made of it, replaced as a whole",
    ),
    Room(
        "reload",
        "errors journal config config.store config.watch privileges systemd tls",
        "trio",
        "when a configuration changes, whatever there is to be replaced",
    ),
    Room("office", "admin config config.store errors journal lobby protocol", "", "the relay's side of that"),
    Room(
        "servers",
        "admin binding config errors protocol sockets systemd tls",
        "trio",
        "loaded only where a route file asks for them",
    ),
    Room(
        "relay",
        f"{LEAVES} journal config config.store config.watch choice names admission privileges tls doubts tickets "
        "lobby raw_pump pairing route refusals reception inspection listener sockets systemd in_force reload office "
        "servers",
        "trio structlog",
        "the nursery tree",
    ),
    Room(
        "workers",
        "admin config errors journal lag listener log office outcome privileges reload relay systemd tls",
        "trio structlog",
        "loaded only by a relay with several processes; it divides a relay, and knows nothing of a connection",
    ),
    Room(
        "cli",
        f"{LEAVES} client client.trio pki log config privileges systemd tls verdict doubts relay workers",
        "typer trio",
        "nothing below knows that it was typed",
    ),
)
BY_NAME: Final = {room.name: room for room in HOUSE}

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


def is_type_checking(node: ast.If) -> bool:
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement that may run, those inside functions included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child):
            for other in child.orelse:
                yield from statements(ast.Module([other], []))
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from statements(child)


def imports(importer: str, source: str, known: frozenset[str]) -> Iterator[Import]:
    """What ``source`` imports: frelay's modules by their full name, others by the name of their distribution's top."""
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno}: relative imports hide where they lead"
            base = node.module or ""
            # `from frelay.protocol import messages` names a module; `from frelay import __version__` does not.
            names = [full if (full := f"{base}.{alias.name}") in known else base for alias in node.names]
        else:
            names = [alias.name for alias in node.names]
        for name in names:
            yield Import(importer, name if name.partition(".")[0] == "frelay" else name.partition(".")[0], node.lineno)


def all_imports() -> list[Import]:
    found = modules()
    known = frozenset(found)
    return [one for name, path in found.items() for one in imports(name, path.read_text(), known)]


def room_of(module: str) -> Room | None:
    """The room of one of frelay's modules; None for the package itself and ``__main__``."""
    name = module.removeprefix("frelay").removeprefix(".")
    while name:
        if name in BY_NAME:
            return BY_NAME[name]
        name = name.rpartition(".")[0]
    return None


def is_ours(one: Import) -> bool:
    return one.imported.partition(".")[0] == "frelay"


def breaks_the_rule(one: Import) -> bool:
    room = room_of(one.importer)
    assert room is not None
    if is_ours(one):
        other = room_of(one.imported)
        if other is None:
            # The package itself is the lightest of all: errors, and `connect` on demand.
            return False
        return other is not room and other.name not in room.rooms.split()
    return one.imported not in sys.stdlib_module_names and one.imported not in room.outside.split()


# --- the table itself -------------------------------------------------------------------------------------------------


def test_every_module_has_its_place() -> None:
    """A new one gets a line in HOUSE, with the reason why it is a room of its own, or moves into one that is there."""
    homeless = [name for name in modules() if room_of(name) is None and name not in ("frelay", "frelay.__main__")]
    assert not homeless


def test_every_room_is_there() -> None:
    assert {room.name for room in HOUSE} == {room.name for name in modules() if (room := room_of(name)) is not None}, (
        "a line of HOUSE without a module"
    )


def test_the_table_runs_right_or_down() -> None:
    """Each room may only use rooms that stand before it, so the table as a whole can have no cycle."""
    seen: set[str] = set()
    for room in HOUSE:
        assert set(room.rooms.split()) <= seen, room.name
        assert room.why
        seen.add(room.name)


# --- the house --------------------------------------------------------------------------------------------------------


def test_imports_run_right_or_down() -> None:
    broken = [str(one) for one in all_imports() if room_of(one.importer) is not None and breaks_the_rule(one)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("leaf", LEAVES.split())
def test_leaves_import_the_standard_library_and_each_other_only(leaf: str) -> None:
    assert set(BY_NAME[leaf].rooms.split()) <= set(LEAVES.split())
    assert BY_NAME[leaf].outside == ""


def test_a_function_needs_the_standard_library_only() -> None:
    """Everything that ``frelay.client`` reaches, by whatever way."""
    graph: dict[str, list[Import]] = {}
    for one in all_imports():
        graph.setdefault(one.importer, []).append(one)
    reached, ahead = set(), ["frelay", "frelay.client.blocking"]
    while ahead:
        module = ahead.pop()
        reached.add(module)
        for one in graph.get(module, []):
            assert is_ours(one) or one.imported in sys.stdlib_module_names, str(one)
            if is_ours(one) and one.imported not in reached:
                ahead.append(one.imported)
    assert {"frelay.client.wire", "frelay.protocol.session", "frelay.errors"} <= reached


def test_the_package_and_its_main_are_doors_and_no_rooms() -> None:
    ours = {
        name: {one.imported for one in all_imports() if one.importer == name and is_ours(one)}
        for name in ("frelay", "frelay.__main__")
    }
    assert ours == {"frelay": {"frelay.errors"}, "frelay.__main__": {"frelay.cli.app"}}


def test_no_module_imports_itself_by_a_detour() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for one in all_imports():
        if is_ours(one) and one.imported in graph:
            graph[one.importer].add(one.imported)
    # `import frelay.x` runs frelay/__init__ first; that is why the package itself may import leaves only.
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" > ".join(error.args[1]))


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
    foreign = {one.imported for one in all_imports() if not is_ours(one)} - set(sys.stdlib_module_names)
    assert foreign <= declared


# --- the test of the test ---------------------------------------------------------------------------------------------

SAMPLE: Final = """
from __future__ import annotations
import os.path, trio
from typing import TYPE_CHECKING
from frelay import __version__, log
if TYPE_CHECKING:
    from frelay.relay import Relay
else:
    import pydantic
def later():
    try:
        from frelay.tls import context
    except ImportError:
        import OpenSSL.SSL
"""


def test_the_reader_of_imports_misses_none() -> None:
    known = frozenset({"frelay", "frelay.log", "frelay.tls.context"})
    found = [one.imported for one in imports("frelay.pump", SAMPLE, known)]
    assert found == [
        *("__future__", "os", "trio", "typing", "frelay", "frelay.log"),
        *("pydantic", "frelay.tls.context", "OpenSSL"),
    ]


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("frelay.protocol.frames", "trio"),
        ("frelay.protocol.frames", "frelay.config.model"),
        ("frelay.errors", "frelay.outcome"),
        ("frelay.client.wire", "cryptography"),
        ("frelay.client.blocking", "frelay.sockets"),
        ("frelay.config.load", "OpenSSL"),
        ("frelay.config.plan", "trio"),
        ("frelay.config.load", "frelay.tls.context"),
        ("frelay.config.load", "frelay.config.watch"),
        ("frelay.leg", "OpenSSL"),
        ("frelay.pump", "frelay.pairing"),
        ("frelay.relay", "frelay.cli.app"),
        ("frelay.tls.stream", "frelay.relay"),
        ("frelay.lobby", "frelay.leg"),
        ("frelay.reload", "frelay.in_force"),
        ("frelay.in_force", "frelay.relay"),
        ("frelay.relay", "frelay.client.blocking"),
        ("frelay.listener", "frelay.pki.authority"),
    ],
)
def test_the_rule_forbids(importer: str, imported: str) -> None:
    assert breaks_the_rule(Import(importer, imported, 1))


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("frelay.protocol.frames", "json"),
        ("frelay.protocol.messages", "frelay.protocol.frames"),
        ("frelay.config.watch", "frelay.config.load"),
        ("frelay.cli.app", "frelay.relay"),
        ("frelay.cli.demo_function", "frelay"),
        ("frelay.tls.context", "OpenSSL"),
    ],
)
def test_the_rule_allows(importer: str, imported: str) -> None:
    assert not breaks_the_rule(Import(importer, imported, 1))
