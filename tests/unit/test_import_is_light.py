"""``import frelay`` is cheap for a function that starts cold: the standard library, and no more of it than needed."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Final

import pytest

import frelay

PACKAGE_ROOT: Final = str(Path(frelay.__file__).resolve().parents[1])


def loaded_after(code: str) -> set[str]:
    """The names of all modules that a fresh interpreter has after running ``code``, whole site-packages at hand."""
    report = "import json, sys; sys.stdout.write(json.dumps(sorted(sys.modules)))"
    # -P: not the current directory, which is anybody's; the package is found where this one was.
    text = f"import sys; sys.path.insert(0, {PACKAGE_ROOT!r}); before = set(sys.modules)\n{code}\n{report}"
    done = subprocess.run([sys.executable, "-P", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout)) - _at_start()


@cache
def _at_start() -> set[str]:
    """What an interpreter of this environment has loaded before anybody asked: tools hook in there by .pth files."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import json, sys; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


def foreign(modules: set[str]) -> set[str]:
    """Those that are neither of the standard library nor ours."""
    tops = {module.partition(".")[0] for module in modules}
    return tops - set(sys.stdlib_module_names) - {"frelay"}


@pytest.mark.parametrize(
    "code",
    [
        "import frelay",
        "import frelay; frelay.connect",
        "import frelay; frelay.listen; frelay.client.asyncio.start_server",
        "import frelay; frelay.group; frelay.client.asyncio.group",
        "from frelay import *",
        "import frelay.client.wire, frelay.protocol.session, frelay.protocol.outcome, frelay.errors",
    ],
)
def test_a_function_loads_the_standard_library_only(code: str) -> None:
    """Neither Trio nor OpenSSL's bindings, pydantic, structlog or typer, which are installed here."""
    modules = loaded_after(code)
    assert "frelay" in modules
    assert foreign(modules) == set()


def test_importing_the_package_alone_loads_neither_ssl_nor_socket() -> None:
    """The client is loaded by the first use of ``connect``."""
    modules = loaded_after("import frelay")
    assert not modules & {"ssl", "_ssl", "socket", "asyncio", "hashlib", "_hashlib", "frelay.client.blocking"}
    assert {"ssl", "frelay.client.blocking"} <= loaded_after("import frelay; frelay.connect")


def test_the_relay_does_load_what_it_needs() -> None:
    """Or the tests above would pass in an environment where there is nothing to load."""
    assert {"trio", "OpenSSL", "pydantic", "structlog"} <= loaded_after("import frelay.relay.relay")


def test_asking_for_help_does_not_load_the_relay() -> None:
    code = "from typer.testing import CliRunner\nfrom frelay.cli.app import app\n"
    code += "assert CliRunner().invoke(app, ['--help']).exit_code == 0"
    modules = loaded_after(code)
    assert not modules & {"trio", "OpenSSL", "cryptography", "pydantic", "fastapi"}
    assert not [name for name in modules if name.startswith("frelay.relay")]


def test_run_ignores_sighup_before_it_loads_the_relay() -> None:
    """A reload that comes that early must not end the process; the relay reads its files later anyway."""
    code = "import signal\nfrom typer.testing import CliRunner\nfrom frelay.cli.app import app\n"
    code += "seen, signal.signal = [], lambda *found: seen.append((found, 'frelay.relay' in sys.modules))\n"
    code += "done = CliRunner().invoke(app, ['run', '-c', '/nowhere.toml'])\n"
    code += "assert isinstance(done.exception, Exception) and 'nowhere.toml' in str(done.exception), done.exception\n"
    code += "assert seen[0] == ((signal.SIGHUP, signal.SIG_IGN), False), seen"
    assert "frelay.relay.run" in loaded_after(code)


@pytest.mark.parametrize("command", ["status", "reload", "top", "route list"])
def test_asking_a_running_relay_loads_no_relay(command: str) -> None:
    """A status in a script or on a prompt is asked for often; HTTP and TLS are all that it needs."""
    code = "from typer.testing import CliRunner\nfrom frelay.cli.app import app\n"
    code += f"done = CliRunner().invoke(app, [*{command.split()!r}, '--admin', 'unix:/nowhere'])\n"
    code += "assert done.exit_code == 1 and 'there is no socket /nowhere' in done.stderr, done.output"
    modules = loaded_after(code)
    assert "frelay.cli.admin_client" in modules
    # Typer itself looks at pydantic, where that is installed, once it has values to convert.
    assert not modules & {"trio", "OpenSSL", "cryptography", "fastapi", "frelay.config.model"}
    assert not [name for name in modules if name.startswith("frelay.relay")]


def test_a_relay_of_one_process_loads_neither_workers_nor_http() -> None:
    """Both are loaded once a route file asks for them: they take a second and 30 MB."""
    modules = loaded_after("import frelay.relay.run")
    assert {"frelay.relay.relay", "frelay.relay.local"} <= modules
    assert not modules & {"fastapi", "frelay.admin.servers", "frelay.relay.workers.supervisor"}


@pytest.mark.parametrize("module", ["check", "why", "plan", "ca_show"])
def test_checking_a_file_loads_no_running_relay(module: str) -> None:
    """The file and its certificates are all that these commands look at: nothing listens, pairs or forwards."""
    modules = loaded_after(f"import frelay.cli.{module}")
    assert "frelay.relay.prepare" in modules
    assert not modules & {"frelay.relay.relay", "frelay.relay.control", "frelay.joining.connection", "fastapi"}


def test_everything_that_is_promised_is_there() -> None:
    for name in frelay.__all__:
        assert getattr(frelay, name) is not None
    with pytest.raises(AttributeError, match="module 'frelay' has no attribute 'conect'"):
        frelay.conect  # noqa: B018  the typo is the test
