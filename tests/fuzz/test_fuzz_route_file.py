"""With any route file ``load`` returns a Config, or raises a ConfigError whose problems a person can read.

What exactly is checked stands in ``fuzz_route_file.py``; here are the strategies that know what such a file looks like.
"""

from __future__ import annotations

import string
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from frelay.config.document import ARRAYS, SECTIONS
from fuzz_route_file import GOOD, check

# Each example reads and writes files, on machines of any speed.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

EXAMPLE = (Path(__file__).parents[2] / "config" / "relay.toml").read_text()


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A directory for the whole module: hypothesis runs a test function many times within one ``tmp_path``."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "routes.d").mkdir()
        yield Path(name)


# --- bytes -------------------------------------------------------------------------------------------------------


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from([GOOD, EXAMPLE])).encode())
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 20))
        kind = draw(st.sampled_from(["delete", "insert", "double", "replace"]))
        if kind == "delete":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + length * 5]
        else:
            new = draw(
                st.binary(max_size=6) | st.sampled_from([b'"', b"'''", b"[[", b"]", b"{", b"\n", b"=", b"group:"])
            )
            content[at : at + (length if kind == "replace" else 0)] = new
    return bytes(content)


@unhurried
@given(mutations())
@example(GOOD.encode())
@example(EXAMPLE.encode())
def test_a_damaged_route_file(directory: Path, content: bytes) -> None:
    check(directory, content)


@unhurried
@given(st.binary(max_size=300))
def test_any_bytes(directory: Path, content: bytes) -> None:
    check(directory, content)


# --- values ------------------------------------------------------------------------------------------------------

KEYS = sorted({key for model in (*SECTIONS.values(), *ARRAYS.values()) for key in model.model_fields})
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "a",
            "mtls",
            "none",
            "hello",
            "always",
            "auto",
            "dns:a.b",
            "dns:*",
            "uri:spiffe://a/*",
            "uri:http://[",
            "spki:sha256:" + "0" * 64,
            "group:a",
            "group:",
            "127.0.0.1:1",
            "0.0.0.0:1",
            "[::1]:1",
            "[::1%\x1b]:1",
            "localhost:1",
            "unix:x",
            "10.0.0.0/8",
            "-----BEGIN",
        ]
    ),
    st.text(string.printable, max_size=8).map("dns:".__add__),
    st.text(string.printable, max_size=8).map("uri:a:".__add__),
)
SCALARS = st.one_of(
    TEXTS,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-1, 3),
    st.floats(),
    st.dates(),
    st.times(),
    st.datetimes(),
)
NAMES = st.sampled_from(KEYS) | st.sampled_from([*SECTIONS, *ARRAYS, "dial", "connect_timeout"]) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8
)


def tables(keys: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(keys) | NAMES, VALUES, max_size=8)


def near(value: object) -> st.SearchStrategy[object]:
    """Usually ``value``, sometimes something else; in tables and lists this is done with the parts."""
    if isinstance(value, dict):
        same: st.SearchStrategy[object] = st.fixed_dictionaries(
            {key: near(inner) for key, inner in value.items()},
            optional={key: VALUES for key in ("x", "listen", "outer", "handoff") if key not in value},
        )
    elif isinstance(value, list):
        same = st.tuples(*(near(inner) for inner in value)).map(list)
    else:
        same = st.just(value)
    return st.integers(0, 15).flatmap(lambda chance: VALUES if chance == 15 else same)


DOCUMENTS = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            **{name: tables(sorted(model.model_fields)) for name, model in SECTIONS.items()},
            **{name: st.lists(tables(sorted(model.model_fields)), max_size=4) for name, model in ARRAYS.items()},
        },
    ),
    near(tomllib.loads(GOOD)).filter(lambda value: isinstance(value, dict)),
)


@unhurried
@given(DOCUMENTS)
def test_any_values_under_any_keys(directory: Path, document: dict[str, Any]) -> None:
    check(directory, tomli_w.dumps(document).encode())


@unhurried
@given(st.binary(max_size=100) | tables(sorted(ARRAYS["route"].model_fields)).map(lambda t: tomli_w.dumps(t).encode()))
@example(b'name = "r"\nlisten = "127.0.0.1:0"\nouter = "none"\nallow_from = ["::1"]\n')
def test_anything_in_a_file_of_routes_dir(directory: Path, content: bytes) -> None:
    check(directory, GOOD.encode(), beside=content)


def test_the_undamaged_files_are_good(directory: Path) -> None:
    """Otherwise the tests above would see only one kind of error."""
    for text in (GOOD, EXAMPLE):
        assert check(directory, text.encode()) is not None
