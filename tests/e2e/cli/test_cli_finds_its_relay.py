"""A command that does not reach its relay says which one, why, and what to do; exit code 1, or 2 for wrong usage."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from support.admin import ADMIN
from support.commands import ask, frelay_command
from support.site import DEMO, Site

COMMANDS = {
    "status": ("status",),
    "reload": ("reload",),
    "top": ("top",),
    "list": ("route", "list"),
    "show": ("route", "show", "demo"),
    "delete": ("route", "delete", "demo"),
    "add": ("route", "add", "demo", "--listen", "127.0.0.1:0", "--func1", "dns:a", "--func2", "dns:b"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_relay(site: Site, command: str) -> None:
    config = site.write(sections=ADMIN)
    said = frelay_command(*COMMANDS[command], "-c", config)
    assert (said.code, said.stdout) == (1, "")
    (message,) = said.messages
    assert message.startswith("frelay: no relay is running here, or it listens elsewhere: there is no socket ")
    assert f"{site.directory}/a.sock (from admin.listen of {config})" in message


def test_no_relay_for_a_plan(site: Site) -> None:
    said = frelay_command("plan", "-c", site.write(sections=ADMIN))
    assert (said.code, said.stdout) == (1, "")
    assert said.messages[0].startswith("frelay: no relay is running here")


def test_no_relay_any_more(site: Site) -> None:
    """kill -9 leaves the socket's file behind."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(site.directory / "a.sock"))
    said = frelay_command("status", "--admin", f"unix:{site.directory}/a.sock")
    assert said.code == 1
    assert said.messages[0].startswith(f"frelay: no relay is running here: nobody listens at {site.directory}/a.sock")


def test_no_admin_section_with_the_two_lines_that_mend_it(site: Site) -> None:
    config = site.write()
    said = frelay_command("status", "-c", config)
    assert said.code == 1
    first, *lines = said.messages
    assert first.startswith(f"frelay: {config} has no [admin] section")
    assert lines == ["  [admin]", '  listen = "unix:frelay.sock"']


def test_no_file_here(tmp_path: Path) -> None:
    said = frelay_command("status", cwd=tmp_path, env={"FRELAY_CONFIG": "", "FRELAY_ADMIN": ""})
    assert said.code == 1
    assert said.messages[0].startswith(f"frelay: there is no route file {tmp_path}/relay.toml")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("status", "--admin", "http://localhost:1"),
            "--admin: 'http://localhost:1' is not the address of an admin API",
        ),
        (("status", "--admin", "localhost:1"), "asks for a certificate: --cert and --ca missing"),
        (("route", "show", "a/b"), "'a/b' cannot be the name of a route"),
        (("route", "show"), "Missing argument 'NAME'"),
        (("route", "add", "x", "--func1", "dns:a"), "Missing option '--listen'"),
        (("top", "--interval", "0"), "Invalid value for '--interval'"),
        (
            ("route", "add", "x", "--listen", "h:1", "--func1", "dns:a", "--func1-dial", "h:2"),
            "a party is either selectors or one address to dial",
        ),
        (
            ("route", "add", "x", "--listen", "h:1", "--new", "--if-match", "e"),
            "--new is for a route that is not there",
        ),
    ],
)
def test_a_wrong_call(site: Site, arguments: tuple[str, ...], text: str) -> None:
    where = () if "--admin" in arguments else ("-c", site.write(sections=ADMIN))
    said = frelay_command(*arguments, *where)
    assert (said.code, said.stdout) == (2, "")
    assert said.messages[0].startswith("Usage: frelay ")
    assert text in " ".join(said.stderr.split())


async def test_the_environment_leads_to_it_too(site: Site, tmp_path: Path) -> None:
    async with site.process(DEMO, sections=ADMIN):
        for env in ({"FRELAY_ADMIN": f"unix:{site.directory}/a.sock"}, {"FRELAY_CONFIG": str(site.config)}):
            said = await ask("status", cwd=tmp_path, env=env)
            assert (said.code, said.stderr) == (0, "")
        said = await ask("status", "--admin", "unix:a.sock", cwd=site.directory)
        assert said.code == 0
