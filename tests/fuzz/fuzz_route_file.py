"""Any route file gives a Config, or a ConfigError that a person can read, in the memory of one file.

Input: one byte for which file it is (odd: the route file itself; even: one in ``routes_dir`` beside a good route file);
its content.

Nothing else is ever raised, no message has a control character, every line that a message names exists, and a good
configuration can be dumped and loaded again without a change.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Final

from campaign import run
from frelay.config.dump import dump_config, load_dump
from frelay.config.load import load
from frelay.config.model import Config
from frelay.config.plan import plan
from frelay.config.route_files import RouteFileEdit
from frelay.errors import ConfigError

__all__ = ["GOOD", "check", "one_input"]

GOOD: Final = """\
[relay]
routes_dir = "routes.d"
[tls]
certificate = "c"
private_key = "k"
client_ca = "a"
[limits]
stall_timeout = 60
[tcp]
keepalive = [30, 10, 3]
[admin]
listen = "unix:s"
[metrics]
listen = "127.0.0.1:0"
[[group]]
name = "g"
parties = ["dns:*.acme", "uri:spiffe://acme/*"]
[[route]]
name = "a"
listen = "[::1]:1"
func1 = "group:g"
func2 = { dial = "db:5432" }
[[route]]
name = "b"
listen = "127.0.0.1:0"
outer = "none"
allow_from = ["10.0.0.0/8"]
require_inner_tls = "always"
"""


def check(directory: Path, content: bytes | None = None, *, beside: bytes | None = None) -> Config | None:
    """Load ``relay.toml`` in ``directory``, with this content if given, and with ``beside`` as a file in routes_dir."""
    path = directory / "relay.toml"
    if content is not None:
        path.write_bytes(content)
    edit = None if beside is None else RouteFileEdit(directory / "routes.d" / "r.toml", beside)
    try:
        config = load(path, edit=edit)
    except ConfigError as error:
        problems = error.problems
    else:
        return check_good(config)
    assert problems
    for problem in problems:
        assert problem.message.isprintable()
        assert problem.key is None or problem.key.isprintable()
        assert len(problem.message) < 2000
        text = beside if edit is not None and beside is not None and problem.file == edit.path else None
        lines = (problem.file.read_bytes() if text is None else text).count(b"\n") + 1
        assert problem.line is None or 1 <= problem.line <= lines
    return None


def check_good(config: Config) -> Config:
    repr(config)
    assert plan(config, config).is_empty
    assert len(plan(None, config).add) == len(config.routes)
    again = load_dump(dump_config(config))
    assert plan(config, again).is_empty
    return config


@cache
def _directory() -> Path:
    # This must stay referenced as long as the process runs.
    directory = _KEPT.name
    (Path(directory) / "routes.d").mkdir()
    return Path(directory)


_KEPT: Final = tempfile.TemporaryDirectory()


def one_input(data: bytes) -> None:
    """Check one input; raises AssertionError, or the exception that should never be raised."""
    directory, content = _directory(), data[1:]
    if data[:1] and data[0] % 2:
        check(directory, content)
    else:
        check(directory, GOOD.encode(), beside=content)


if __name__ == "__main__":
    run(one_input, instrument=("frelay.config", "frelay.protocol", "tomllib", "__main__"))
