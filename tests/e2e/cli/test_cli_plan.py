"""``frelay plan`` shows what a reload would change and which pairings it would end, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.admin import ADMIN
from support.commands import Said, ask, frelay_command
from support.party import pair
from support.ports import reserved_port
from support.site import DEMO, Site

TWO = DEMO.replace('"demo"', '"two"')
BY_API = ("--listen", "127.0.0.1:0", "--func1", "dns:a.acme", "--func2", "dns:b.acme")
THREE = DEMO.replace('"demo"', '"three"')


def new(site: Site, routes: str, *, sections: str = ADMIN) -> Path:
    """A second file in the directory of the running one."""
    running = site.config.read_text() if site.config.exists() else None
    path = site.write(routes, sections=sections).rename(site.directory / "new.toml")
    if running is not None:
        site.config.write_text(running)
    return path


def found(said: Said) -> dict[str, Any]:
    assert said.stderr == ""
    plan: dict[str, Any] = json.loads(said.stdout)
    return plan


async def test_everything_that_can_change(site: Site) -> None:
    async with site.process(DEMO + TWO + THREE, sections=ADMIN, options=["--no-watch"]) as relay:
        parties = [await site.party(relay, name, route="demo") for name in ("func1", "func2")]
        await pair(*parties)
        for party in parties:
            await party.hand_off()  # otherwise handoff_timeout would end it if the commands take long
        waits = await site.party(relay, "func1", route="two")
        await waits.join()
        await waits.expect("WAITING")
        other = DEMO.replace("dns:func1.demo", "dns:other.demo") + "wait_timeout = 7\n"
        four = DEMO.replace('"demo"', '"four"').replace(":0", ":9004")
        sections = ADMIN + '[relay]\nname = "n"\ndrain_timeout = 9\n[limits]\nping_interval = 3\n'
        path = new(site, other + THREE + "idle_timeout = 10\n" + four, sections=sections)
        said = await ask("plan", "-c", path)
        as_json = await ask("plan", "-c", path, "--json")
        # A plan changes nothing: no leg was refused, and no port was bound.
        assert relay.logged("reloaded") == []
    assert (said.code, said.stderr) == (0, "")
    assert said.stdout.splitlines() == [
        f"{path} against relay-1 at unix:{site.directory}/a.sock:",
        "  replace  demo: 1 pairing (cut after 9 s), 0 waiting",
        "             func1: dns:func1.demo -> dns:other.demo",
        "             wait_timeout: 60 -> 7",
        "  remove   two, on 127.0.0.1:0: 0 pairings, 1 waiting",
        "  add      four, on 127.0.0.1:9004",
        "  keep     three, with other limits for new legs and pairings",
        "             idle_timeout: 3600 -> 10",
        "  bind     127.0.0.1:9004",
        "  close    127.0.0.1:0 (route two)",
        "  setting  relay.drain_timeout: 30 -> 9",
        "  setting  limits.ping_interval: 15 -> 3",
        "  restart  relay.name: relay-1 -> n, and only then",
    ]
    plan = found(as_json)
    assert as_json.code == 0
    assert plan == {
        "ok": True,
        "problems": [],
        "warnings": [],
        "changes": True,
        "running": f"relay-1 at unix:{site.directory}/a.sock",
        "keep": [
            {
                "name": "three",
                "listen": "127.0.0.1:0",
                "pairings": 0,
                "waiting": 0,
                "changed": [{"key": "idle_timeout", "from": 3600, "to": 10}],
            }
        ],
        "add": [{"name": "four", "listen": "127.0.0.1:9004"}],
        "remove": [{"name": "two", "listen": "127.0.0.1:0", "pairings": 0, "waiting": 1}],
        "replace": [
            {
                "name": "demo",
                "listen": "127.0.0.1:0",
                "pairings": 1,
                "waiting": 0,
                "changed": [
                    {"key": "func1", "from": ["dns:func1.demo"], "to": ["dns:other.demo"]},
                    {"key": "wait_timeout", "from": 60, "to": 7},
                ],
            }
        ],
        "bind": ["127.0.0.1:9004"],
        "close": ["127.0.0.1:0"],
        "clashes": [],
        "settings": [
            {"key": "relay.drain_timeout", "from": 30, "to": 9},
            {"key": "limits.ping_interval", "from": 15, "to": 3},
        ],
        "restart_only": [{"key": "relay.name", "from": "relay-1", "to": "n"}],
    }


async def test_what_is_planned_is_what_a_reload_then_does(site: Site) -> None:
    async with site.process(DEMO + TWO, sections=ADMIN, options=["--no-watch"]):
        site.write(DEMO.replace("dns:func1.demo", "dns:other.demo") + THREE, sections=ADMIN)
        plan = found(await ask("plan", "-c", site.config, "--json"))
        done = json.loads((await ask("reload", "-c", site.config, "--json")).stdout)
        after = await ask("plan", "-c", site.config)
    names = {key: [one["name"] for one in plan[key]] for key in ("keep", "add", "remove", "replace")}
    assert names == {"keep": [], "add": ["three"], "remove": ["two"], "replace": ["demo"]}
    assert (done["kept"], done["added"], done["removed"], done["replaced"]) == (0, ["three"], ["two"], ["demo"])
    assert (after.code, after.stdout) == (
        0,
        f"no changes against relay-1 at unix:{site.directory}/a.sock: 2 routes as now\n",
    )


def test_two_files_need_no_relay(site: Site) -> None:
    old = site.write(DEMO + TWO)
    said = frelay_command("plan", "-c", new(site, DEMO, sections=""), "--running", old)
    assert (said.code, said.stderr) == (0, "")
    assert said.stdout.splitlines()[1:] == [
        "  remove   two, on 127.0.0.1:0",
        "  keep     1 route as now",
        "  close    127.0.0.1:0 (route two)",
    ]
    plan = found(frelay_command("plan", "-c", site.directory / "new.toml", "--running", old, "--json"))
    assert plan["remove"] == [{"name": "two", "listen": "127.0.0.1:0", "pairings": None, "waiting": None}]
    same = frelay_command("plan", "-c", old, "--running", old)
    assert (same.code, same.stdout) == (0, f"no changes against {old}: 2 routes as now\n")


async def test_a_file_elsewhere_is_read_as_if_it_stood_in_the_place_of_the_running_one(site: Site) -> None:
    """Relative paths, also routes_dir, lead to the files of the relay, if the user says where the relay is."""
    elsewhere = site.directory / "drafts" / "new.toml"
    elsewhere.parent.mkdir()
    found_by = f"unix:{site.directory}/a.sock"
    async with site.process(DEMO, sections=ADMIN, options=["--no-watch"]):
        assert (await ask("route", "add", "by-api", *BY_API, "--admin", found_by)).code == 0
        elsewhere.write_text(site.config.read_text() + TWO)
        said = await ask("plan", "-c", elsewhere, "--admin", found_by)
        same = await ask("plan", "-c", "new.toml", cwd=elsewhere.parent, env={"FRELAY_ADMIN": found_by})
        lost = await ask("plan", "-c", elsewhere)
        here = await ask("plan", "-c", elsewhere, cwd=site.directory)
        by_file = await ask("plan", "-c", elsewhere, env={"FRELAY_CONFIG": str(site.config)})
        elsewhere.write_text(elsewhere.read_text().replace(ADMIN, ""))
        without = await ask("plan", "-c", elsewhere, cwd=site.directory)
    assert (said.code, said.stderr) == (0, "")
    assert said.stdout.splitlines() == [
        f"{elsewhere} against relay-1 at {found_by}, as if it were in {site.directory}:",
        "  add      two, on 127.0.0.1:0",
        "  keep     2 routes as now",
        "  bind     127.0.0.1:0 (route two)",
    ]
    assert same == here == by_file == said
    assert "  restart  admin: " in without.stdout
    assert lost.code == 1
    assert f"{elsewhere.parent}/{site.ca_path.name} does not exist" in lost.stderr
    assert "Name the relay with --admin, or its file with --running" in lost.messages[-1]


def test_a_file_elsewhere_beside_a_running_file(site: Site) -> None:
    old = site.write(DEMO)
    elsewhere = site.directory / "drafts" / "new.toml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(old.read_text() + TWO)
    said = frelay_command("plan", "-c", elsewhere, "--running", old)
    assert (said.code, said.stderr) == (0, "")
    assert said.stdout.splitlines()[0] == f"{elsewhere} against {old}, as if it were in {site.directory}:"
    assert said.stdout.splitlines()[1] == "  add      two, on 127.0.0.1:0"


def test_a_section_that_comes_is_shown_as_a_whole(site: Site) -> None:
    old = site.write(DEMO)
    plan = found(frelay_command("plan", "-c", new(site, DEMO), "--running", old, "--json"))
    admin = {"listen": f"unix:{site.directory}/a.sock", "allow": []}
    assert plan["restart_only"] == [{"key": "admin", "from": None, "to": admin}]


def test_a_clash_is_a_reload_that_would_be_refused(site: Site) -> None:
    with reserved_port() as port:
        old = site.write(DEMO.replace("127.0.0.1:0", f"127.0.0.1:{port}"))
        path = new(site, DEMO.replace("127.0.0.1:0", f"0.0.0.0:{port}"), sections="")
        said = frelay_command("plan", "-c", path, "--running", old)
        as_json = frelay_command("plan", "-c", path, "--running", old, "--json")
    assert (said.code, said.stderr) == (1, "")
    assert said.stdout.startswith(f"WOULD BE REFUSED: 0.0.0.0:{port} cannot be bound before 127.0.0.1:{port} is closed")
    plan = found(as_json)
    assert (as_json.code, plan["ok"]) == (1, False)
    assert plan["clashes"] == [{"bind": f"0.0.0.0:{port}", "close": f"127.0.0.1:{port}"}]


def test_a_bad_file_is_told_as_check_tells_it(site: Site) -> None:
    """The file is checked before a relay is asked."""
    path = site.write(DEMO + "wait_timeot = 1\n", sections=ADMIN)
    for options in ((), ("--json",)):
        plan, check = (frelay_command(command, "-c", path, *options) for command in ("plan", "check"))
        assert plan == check
        assert plan.code == 1
        assert "wait_timeot" in plan.stdout + plan.stderr


def test_a_certificate_that_a_relay_would_refuse(site: Site) -> None:
    path = site.write(DEMO, sections=ADMIN)
    site.relay_paths[1].chmod(0o644)
    said = frelay_command("plan", "-c", path)
    assert (said.code, said.stdout) == (1, "")
    assert "has mode 0644, others can read it" in said.messages[0]


def test_a_bad_running_file(site: Site) -> None:
    path = site.write(DEMO)
    said = frelay_command("plan", "-c", path, "--running", site.directory / "no.toml")
    assert (said.code, said.stdout) == (1, "")
    assert said.messages[0].startswith(f"frelay: {site.directory}/no.toml: there is no such file")
