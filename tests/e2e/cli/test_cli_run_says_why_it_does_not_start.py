"""If ``frelay run`` cannot start, it prints one clear message for each problem and no traceback; exit code 1 or 2."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Final

import pytest
import structlog
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from frelay.cli.app import main
from frelay.relay import privileges
from support.admin import ADMIN
from support.certs import TestAuthority
from support.commands import Said, ask, frelay_command
from support.site import DEMO, Site


def run(config: Path) -> Said:
    return frelay_command("run", "-c", config)


def in_process(*arguments: str | Path, cwd: Path | None = None) -> Said:
    """As :func:`run`, but in this process, which saves half a second: for calls that end before a relay runs.

    It gives up no privileges on its way: they would be those of all tests after it.
    """
    stdout, stderr = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        if cwd is not None:
            patch.chdir(cwd)
        patch.setattr(sys, "argv", ["frelay", *map(str, arguments)])
        patch.setattr(privileges, "give_up", lambda config: None)
        with pytest.raises(SystemExit) as ended:
            main()
    structlog.reset_defaults()
    assert isinstance(ended.value.code, int)
    return Said(ended.value.code, stdout.getvalue(), stderr.getvalue())


def only_message(said: Said) -> str:
    """The one message of a failed start: on stderr, and nothing on stdout."""
    assert (said.code, said.stdout) == (1, "")
    (message,) = said.messages
    assert message.startswith("frelay: ")
    return message


# --- the route file ---------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    message = only_message(run(tmp_path / "relay.toml"))
    assert message.startswith(f"frelay: {tmp_path}/relay.toml: there is no such file")
    assert "frelay init DIR" in message


def test_a_missing_file_by_default(tmp_path: Path) -> None:
    """Without -c it is relay.toml in the current directory, and the message has its whole path."""
    said = frelay_command("run", cwd=tmp_path, env={"FRELAY_CONFIG": ""})
    assert f"{tmp_path}/relay.toml: there is no such file" in only_message(said)


def test_a_directory(tmp_path: Path) -> None:
    assert f"{tmp_path}: is a directory: name the file in it" in only_message(run(tmp_path))


def test_a_syntax_error_with_its_line(site: Site) -> None:
    """TESTPLAN 40, at start."""
    config = site.write()
    lines = config.read_text().splitlines()
    config.write_text("\n".join([*lines, "[[route]", ""]))
    message = only_message(run(config))
    assert message.startswith(f"frelay: {config}:{len(lines) + 1}: is not valid TOML")


def test_every_problem_of_an_invalid_file_at_once(site: Site) -> None:
    """TESTPLAN 40, at start: file, line and key of each, in the order of the file."""
    config = site.config
    config.write_text(
        f"""\
[relay]
nam = "x"
[tls]
certificate = "{site.relay_paths[0].name}"
private_key = "{site.relay_paths[1].name}"
client_ca = "{site.ca_path.name}"
[limits]
wait_timeout = "soon"
[[route]]
name = "a"
listen = "nowhere"
func1 = "dns:func1.demo"
[[route]]
name = "a"
listen = "127.0.0.1:0"
func1 = "func1.demo"
func2 = "dns:func2.demo"
"""
    )
    said = run(config)
    assert (said.code, said.stdout) == (1, "")
    places = [message.removeprefix(f"frelay: {config}:").split(": ")[:2] for message in said.messages]
    assert places == [
        ["2", "relay.nam"],
        ["8", "limits.wait_timeout"],
        ["9", "route[a].func2"],
        ["11", "route[a].listen"],
        ["14", "route[a].name"],
        ["16", "route[a].func1"],
    ]


# --- what the file refers to ------------------------------------------------------------------------------------------


def _mode(site: Site) -> None:
    site.relay_paths[1].chmod(0o644)


def _other_key(site: Site) -> None:
    site.relay_paths[1].write_bytes(site.ca.relay().key_pem)


def _expired(site: Site) -> None:
    cert, key = site.ca.expired(dns=["localhost"]).write(site.directory, "expired")
    cert.replace(site.relay_paths[0])
    key.replace(site.relay_paths[1])


def _of_a_function(site: Site) -> None:
    purposes = site.ca.odd([], name="client-only", purposes=[_client_auth()])
    cert, key = purposes.write(site.directory, "client-only")
    cert.replace(site.relay_paths[0])
    key.replace(site.relay_paths[1])


def _client_auth() -> x509.ObjectIdentifier:
    return ExtendedKeyUsageOID.CLIENT_AUTH


def _missing(site: Site) -> None:
    site.relay_paths[0].unlink()


def _no_pem(site: Site) -> None:
    site.relay_paths[0].write_text("no PEM\n")


def _leaf_as_ca(site: Site) -> None:
    site.ca_path.write_bytes(site.credentials["func1"].cert_pem)


BROKEN: Final[dict[str, tuple[Callable[[Site], None], str, str]]] = {
    "key readable by others": (_mode, "tls.private_key", "relay.key has mode 0644, others can read it; chmod 600 "),
    "key of another certificate": (_other_key, "tls.private_key", "relay.key is not the key of "),
    "certificate expired": (_expired, "tls.certificate", "relay.pem expired on "),
    "certificate not for servers": (_of_a_function, "tls.certificate", "relay.pem is not for servers"),
    "certificate missing": (_missing, "tls.certificate", "relay.pem does not exist; `frelay init DIR` writes"),
    "certificate unreadable": (_no_pem, "tls.certificate", "relay.pem holds no readable PEM certificate"),
    "CA that is none": (_leaf_as_ca, "tls.client_ca", "is not a CA certificate"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_certificates_that_cannot_work(site: Site, what: str) -> None:
    """TESTPLAN 40, at start: key path, file, and what to do."""
    break_it, key, text = BROKEN[what]
    config = site.write()
    break_it(site)
    message = only_message(in_process("run", "-c", config))
    assert message.startswith(f"frelay: {config}")
    assert f": {key}: {site.directory}/" in message
    assert text in message


def test_a_crl_that_ran_out(site: Site) -> None:
    """TESTPLAN 12: a relay never admits all, not even at start."""
    config = site.write(crl=True)
    assert "tls.crl" in only_message(in_process("run", "-c", config))
    site.ca.write_crl(site.directory, site.ca.expired_crl())
    assert "expired on" in only_message(in_process("run", "-c", config))
    site.ca.write_crl(site.directory, TestAuthority("other CA").crl())
    assert "was not signed by any CA of" in only_message(in_process("run", "-c", config))


def test_several_broken_files_at_once(site: Site) -> None:
    config = site.write(crl=True)
    _mode(site)
    _missing(site)
    said = in_process("run", "-c", config)
    assert said.code == 1
    assert {message.split(": ")[2] for message in said.messages} == {"tls.certificate", "tls.private_key", "tls.crl"}


def test_a_key_that_others_can_read_stops_the_process(site: Site) -> None:
    config = site.write()
    _mode(site)
    assert f"has mode 0644, others can read it; chmod 600 {site.relay_paths[1]}" in only_message(run(config))


def test_a_port_in_use(site: Site) -> None:
    """The free address beside it is released."""
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        ports = [sock.getsockname()[1] for sock in (taken, free)]
        routes = "".join(
            DEMO.replace('name = "demo"', f'name = "r{port}"').replace("127.0.0.1:0", f"127.0.0.1:{port}")
            for port in ports
        )
        free.close()
        message = only_message(run(site.write(routes)))
    assert f"route[r{ports[0]}].listen: cannot listen on 127.0.0.1:{ports[0]}: Address already in use" in message
    with socket.create_server(("127.0.0.1", ports[1])):
        pass


def test_an_address_of_another_machine(site: Site) -> None:
    """192.0.2.0/24 is for documentation (RFC 5737): no machine has it."""
    message = only_message(run(site.write(DEMO.replace("127.0.0.1:0", "192.0.2.1:0"))))
    assert "route[demo].listen: cannot listen on 192.0.2.1:0: " in message


async def test_an_admin_socket_in_use(site: Site) -> None:
    """Two relays with one file: the second one fails with a message, and the first one still answers."""
    async with site.process(DEMO, sections=ADMIN):
        said = await ask("run", "-c", site.config)
        assert (await ask("status", "-c", site.config)).code == 0
    message = said.messages[-1]
    assert said.code == 1
    assert message == (
        f"frelay: {site.config}: admin.listen: cannot listen on unix:{site.directory}/a.sock: another process answers "
        "there; if that is a relay with this file, it runs already: see frelay status"
    )


def test_an_admin_socket_where_a_file_is(site: Site) -> None:
    """The file belongs to somebody, and is not changed."""
    config = site.write(sections=ADMIN)
    (site.directory / "a.sock").write_text("mine")
    said = run(config)
    assert said.code == 1
    assert "cannot listen on unix:" in said.messages[-1]
    assert "there is a file of that name, and it is no socket" in said.messages[-1]
    assert (site.directory / "a.sock").read_text() == "mine"


def test_an_admin_socket_without_its_directory(site: Site) -> None:
    said = run(site.write(sections='[admin]\nlisten = "unix:no/a.sock"\n'))
    assert said.code == 1
    assert said.messages[-1].endswith(f"cannot listen on unix:{site.directory}/no/a.sock: its directory does not exist")


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("run", "--nope"), "No such option: --nope"),
        (("run", "relay.toml"), "unexpected extra argument"),
        (("run", "-c"), "requires an argument"),
        (("run", "--log-format", "xml"), "Invalid value for --log-format: write console or json"),
        (("run", "--log-level", "loud"), "Invalid value for --log-level: write one of debug, info, warning, error"),
        (("rnu",), "No such command 'rnu'"),
        (("check", "--nope"), "No such option: --nope"),
        (("init",), "Missing argument 'DIR'"),
        (("demo", "now"), "unexpected extra argument"),
    ],
)
def test_a_wrong_call_is_exit_2_with_the_usage(arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    """Usage errors come before any file is read: there is no relay.toml here, and no message about that."""
    said = in_process(*arguments, cwd=tmp_path)
    assert (said.code, said.stdout) == (2, "")
    assert text in said.stderr
    # The parser prints no usage line for some of its own errors.
    assert said.messages[0].startswith(("Usage: frelay ", "Error: Option '-c' requires an argument"))
    assert "no such file" not in said.stderr


def test_a_wrong_call_of_the_process(tmp_path: Path) -> None:
    """What counts is the exit code, for the process that started it."""
    said = frelay_command("run", "--nope", cwd=tmp_path)
    assert (said.code, said.stdout) == (2, "")
    assert "No such option: --nope" in said.stderr


def test_help_and_version_are_data() -> None:
    said = frelay_command("--version")
    assert (said.code, said.stdout, said.stderr) == (0, "frelay 0.1.0\n", "")
    said = frelay_command("--help")
    assert (said.code, said.stderr) == (0, "")
    for command in ("run", "check", "init", "demo"):
        assert f"\n  {command} " in said.stdout
