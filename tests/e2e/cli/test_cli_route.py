"""``frelay route``: add, delete, list and show, on a running relay; every refusal names all problems."""

from __future__ import annotations

import json
import tomllib

from support.admin import ADMIN
from support.commands import Said, ask
from support.party import pair
from support.ports import reserved_port
from support.site import DEMO, Site

PARTIES = ("--func1", "dns:func1.demo", "--func2", "dns:func2.demo")


async def route(site: Site, *arguments: str) -> Said:
    return await ask("route", *arguments, "-c", site.config)


async def add(site: Site, name: str, *options: str) -> Said:
    return await route(site, "add", name, "--listen", "127.0.0.1:0", *PARTIES, *options)


async def test_an_added_route_serves_and_a_deleted_one_does_not(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN) as relay:
        said = await add(site, "two")
        assert (said.code, said.stderr) == (0, "")
        assert said.stdout.startswith("two: added, listens on 127.0.0.1:")
        assert said.stdout.endswith(f"written to {site.directory}/routes.d/two.toml\n")
        await pair(await site.party(relay, "func1", route="two"), await site.party(relay, "func2", route="two"))
        again = await add(site, "two")
        assert again.stdout.startswith("two: updated, listens on ")
        gone = await route(site, "delete", "two")
        assert (gone.code, gone.stdout, gone.stderr) == (0, "two: deleted\n", "")
        assert not (site.directory / "routes.d" / "two.toml").exists()
        unknown = await route(site, "delete", "two")
        assert (unknown.code, unknown.stdout) == (1, "")
        assert unknown.messages == ["frelay: there is no route 'two'"]


async def test_every_option_is_written(site: Site) -> None:
    options = "--outer mtls --handoff hello --require-inner-tls false --hello-settle 0.5 --ticket-timeout 4"
    limits = "--wait-timeout 5 --half-close-timeout 6 --idle-timeout 7 --stall-timeout 8"
    counts = "--max-waiting-per-party 9 --max-waiting-per-meet 11 --max-waiting-by-meet 12 --max-pairings 10"
    async with site.process(DEMO, sections=ADMIN):
        said = await add(site, "two", "--func1", "dns:*.demo", *f"{options} {limits} {counts}".split())
        assert said.code == 0, said.stderr
        plain = await route(
            site, "add", "mesh", "--listen", "127.0.0.1:0", "--outer", "none", "--allow-from", "10.0.0.0/8",
            "--allow-from", "127.0.0.1/32",
        )  # fmt: skip
        assert plain.code == 0, plain.stderr
    assert tomllib.loads((site.directory / "routes.d" / "two.toml").read_text()) == {
        "name": "two",
        "listen": "127.0.0.1:0",
        "func1": ["dns:func1.demo", "dns:*.demo"],
        "func2": ["dns:func2.demo"],
        "outer": "mtls",
        "handoff": "hello",
        "require_inner_tls": False,
        "hello_settle": 0.5,
        "ticket_timeout": 4,
        "wait_timeout": 5,
        "half_close_timeout": 6,
        "idle_timeout": 7,
        "stall_timeout": 8,
        "max_waiting_per_party": 9,
        "max_waiting_per_meet": 11,
        "max_waiting_by_meet": 12,
        "max_pairings": 10,
    }
    mesh = tomllib.loads((site.directory / "routes.d" / "mesh.toml").read_text())
    assert mesh["allow_from"] == ["10.0.0.0/8", "127.0.0.1/32"]


async def test_a_party_may_be_a_place_to_dial(site: Site) -> None:
    one = ("--listen", "127.0.0.1:0", "--func1", "dns:func1.demo")
    async with site.process(DEMO, sections=ADMIN):
        for name, place in (("a", ("--func2", "dial:127.0.0.1:5432")), ("b", ("--func2-dial", "127.0.0.1:5432"))):
            said = await route(site, "add", name, *one, *place, "--dial-timeout", "2")
            assert said.code == 0, said.stderr
            written = tomllib.loads((site.directory / "routes.d" / f"{name}.toml").read_text())
            assert written["func2"] == {"dial": "127.0.0.1:5432", "connect_timeout": 2}
        listed = await route(site, "list")
        planned = await ask("plan", "-c", site.config)
    assert listed.stdout.count("  dial:127.0.0.1:5432  ") == 2
    assert planned.stdout.startswith("no changes against ")


async def test_a_list_for_a_person_and_for_a_program(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN) as relay:
        assert (await add(site, "a-longer-name")).code == 0
        one = await site.party(relay, "func1")
        await one.join()
        await one.expect("WAITING")
        said = await route(site, "list")
        as_json = await route(site, "list", "--json")
        shown = await route(site, "show", "demo")
    head, demo, other = said.stdout.splitlines()
    assert head.split() == ["NAME", "LISTEN", "FUNC1", "FUNC2", "WAITING", "1/2", "PAIRINGS", "BYTES", "FILE"]
    address = f"127.0.0.1:{relay.own_port()}"
    assert demo.split() == ["demo", address, "dns:func1.demo", "dns:func2.demo", "1/0", "0", "0", "B", str(site.config)]
    assert other.startswith("a-longer-name  127.0.0.1:")
    # Aligned: every cell of a column begins where its heading begins.
    assert {line.index("dns:func2") for line in (demo, other)} == {head.index("FUNC2")}
    found = json.loads(as_json.stdout)
    assert [one["name"] for one in found["routes"]] == ["demo", "a-longer-name"]
    assert f"listen                 127.0.0.1:0, bound to {address}\n" in shown.stdout
    assert "waiting func1          1\n                       dns:func1.demo from 127.0.0.1:" in shown.stdout
    assert f"{site.config}, which the API never writes\n" in shown.stdout


async def test_two_who_change_a_route_do_not_undo_each_other(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN):
        assert (await add(site, "two", "--new")).code == 0
        tag = json.loads((await route(site, "show", "two", "--json")).stdout)["etag"]
        twice = await add(site, "two", "--new")
        assert (twice.code, twice.messages) == (1, ["frelay: there is a route 'two' already"])
        assert (await add(site, "two", "--wait-timeout", "7", "--if-match", tag)).code == 0
        for late in (await add(site, "two", "--if-match", tag), await route(site, "delete", "two", "--if-match", tag)):
            assert (late.code, late.stdout) == (1, "")
            assert late.messages == ["frelay: the route 'two' has changed meanwhile: read it again"]
        now = json.loads((await route(site, "show", "two", "--json")).stdout)
        assert now["limits"]["wait_timeout"] == 7
        # A shell removes the quotes of an etag.
        assert (await route(site, "delete", "two", "--if-match", now["etag"].strip('"'))).code == 0


async def test_a_route_of_the_operators_file_is_a_conflict_that_names_both_files(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN):
        for said in (await add(site, "demo"), await route(site, "delete", "demo")):
            assert (said.code, said.stdout) == (1, "")
            (message,) = said.messages
            assert f"stands in {site.config}, which frelay never writes" in message
            assert f"{site.directory}/routes.d/demo.toml" in message


async def test_an_address_that_is_taken_is_a_conflict(site: Site) -> None:
    with reserved_port() as port:
        taken = DEMO.replace("127.0.0.1:0", f"127.0.0.1:{port}")
        async with site.process(taken, sections=ADMIN):
            said = await ask("route", "add", "two", "--listen", f"0.0.0.0:{port}", *PARTIES, "-c", site.config)
            as_json = await ask(
                "route", "add", "two", "--listen", f"0.0.0.0:{port}", *PARTIES, "-c", site.config, "--json"
            )
    assert (said.code, said.stdout) == (1, "")
    message, *problems = said.messages
    assert message == "frelay: the route cannot be beside what is there"
    assert any(f"{site.config}" in line or f"127.0.0.1:{port}" in line for line in problems)
    assert (as_json.code, as_json.stderr) == (1, "")
    assert json.loads(as_json.stdout)["error"] == "conflict"


async def test_a_wrong_route_has_every_key_listed(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN):
        said = await ask(
            *("route", "add", "two", "--listen", "nowhere", "--func1", "func1.demo", "--wait-timeout", "-1"),
            *("--handoff", "close-notify", "--max-pairings", "0", "-c", str(site.config)),
        )
        wrong_word = await add(site, "two", "--handoff", "loud", "--require-inner-tls", "perhaps")
        wrong_name = await add(site, "-no")
    assert (said.code, said.stdout) == (1, "")
    message, *problems = said.messages
    assert message == "frelay: the route is wrong"
    assert {line.split(": ")[0].strip() for line in problems} == {
        "listen",
        "func1[0]",
        "func2",
        "wait_timeout",
        "max_pairings",
    }
    assert wrong_word.code == 1
    assert {line.split(": ")[0].strip() for line in wrong_word.messages[1:]} >= {"handoff", "require_inner_tls"}
    assert wrong_name.code != 0
    assert list(site.directory.glob("routes.d/*")) == []


async def test_a_route_that_is_not_there(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN):
        said = await route(site, "show", "nope")
        as_json = await route(site, "show", "nope", "--json")
    assert (said.code, said.stdout, said.messages) == (1, "", ["frelay: there is no route 'nope'"])
    assert (as_json.code, json.loads(as_json.stdout)["error"]) == (1, "not-found")


async def test_the_shell_completes_names(site: Site, tmp_path: object) -> None:
    words = f"frelay route show -c {site.config} d"
    asked = {"_FRELAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "5"}
    async with site.process(DEMO, sections=ADMIN):
        assert (await ask(env=asked)).stdout.split() == ["demo"]
    # Without a relay there is nothing to offer, and no message may appear in the command line.
    said = await ask(env=asked)
    assert (said.stdout.split(), said.stderr) == ([], "")
