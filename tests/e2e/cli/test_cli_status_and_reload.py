"""``frelay status`` and ``frelay reload``: what a relay is doing, what needs attention, and what a reload did."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from support.admin import ADMIN
from support.certs import TestAuthority
from support.commands import ask
from support.site import DEMO, Site

TWO = DEMO.replace('"demo"', '"two"')


async def test_a_status_for_a_person(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN) as relay:
        one = await site.party(relay, "func1")
        await one.join()
        await one.expect("WAITING")
        stranger = await site.party(relay, None)
        await stranger.ended()
        said = await ask("status", "-c", site.config)
    assert (said.code, said.stderr) == (0, "")
    first, *lines = said.stdout.splitlines()
    assert first.startswith("relay-1: running, up ")
    assert "frelay 0.1.0, OpenSSL " in first
    assert first.endswith(f"pid {relay.process.pid}")
    facts = {line[:14].strip(): line[14:] for line in lines}
    assert facts["config"] == str(site.config)
    assert facts["last reload"].startswith("ok, ")
    assert (facts["routes"], facts["waiting"], facts["pairings"]) == ("1", "1", "0")
    assert facts["certificates"].startswith("certificate CN=relay: until ")
    assert "last refusals:" in lines
    assert "127.0.0.1" in lines[-1]


async def test_a_status_for_a_program_is_that_of_the_api(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN):
        said = await ask("status", "-c", site.config, "--json")
    found = json.loads(said.stdout)
    assert (said.code, said.stderr) == (0, "")
    assert (found["state"], found["routes"], found["last_reload"]["ok"]) == ("running", 1, True)


async def test_a_refused_reload_stands_on_top_of_the_status(site: Site) -> None:
    """The command itself still succeeds: it has printed the status."""
    async with site.process(DEMO, sections=ADMIN, options=["--no-watch"]):
        site.write(DEMO + "wait_timeot = 1\n[[route]]\nname = 3\n", sections=ADMIN)
        refused = await ask("reload", "-c", site.config)
        said = await ask("status", "-c", site.config)
        as_json = await ask("reload", "-c", site.config, "--json")
    assert (refused.code, refused.stdout) == (1, "")
    message, *problems = refused.messages
    assert message == "frelay: the configuration was refused, and the old one stays"
    assert [line.split(": ")[1] for line in problems][:2] == ["route[demo].wait_timeot", "route[1].func1"]
    assert all(line.startswith(f"  {site.config}:") for line in problems)

    top, *lines = said.stdout.splitlines()
    assert said.code == 0
    assert top.startswith("LAST RELOAD REFUSED ")
    assert top.endswith(" ago, the configuration before it stays in force:")
    assert "route[demo].wait_timeot" in lines[0]
    assert any(line.startswith("last reload   REFUSED, ") for line in lines)

    assert (as_json.code, as_json.stderr) == (1, "")
    answer = json.loads(as_json.stdout)
    assert answer["error"] == "conflict"
    assert answer["problems"][0]["key"] == "route[demo].wait_timeot"


async def test_a_reload_says_what_it_changed(site: Site) -> None:
    async with site.process(DEMO + TWO, sections=ADMIN, options=["--no-watch"]):
        three = DEMO.replace('"demo"', '"three"')
        site.write(DEMO.replace("dns:func1.demo", "dns:other.demo") + three, sections=ADMIN + '[relay]\nname = "n"\n')
        said = await ask("reload", "-c", site.config)
        again = await ask("reload", "-c", site.config, "--json")
    assert (said.code, said.stderr) == (0, "")
    assert said.stdout.splitlines() == [
        "added: three",
        "removed: two",
        "replaced: demo",
        "kept: 0 routes",
        "only after a restart: relay.name",
    ]
    assert json.loads(again.stdout)["kept"] == 2


async def test_certificates_that_run_out_are_warned_of(tmp_path: Path) -> None:
    site = Site(tmp_path, TestAuthority())
    site.ca.write_crl(site.directory, site.ca.crl(next_update=datetime.now(UTC) + timedelta(days=3)))
    async with site.process(DEMO, sections=ADMIN, crl=True):
        said = await ask("status", "-c", site.config)
    assert said.stdout.startswith(f"CRL EXPIRES IN 2 d 23 h: {site.directory}/crl.pem\nrelay-1: running")


async def test_no_colour_and_no_escape_where_nobody_looks(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN):
        for command in (("status",), ("route", "list"), ("top", "--interval", "0.1")):
            said = await ask(*command, "-c", site.config)
            assert said.code == 0
            assert "\x1b" not in said.stdout
