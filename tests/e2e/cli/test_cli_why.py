"""``frelay why``: its output and exit codes. ``test_why_says_what_the_relay_does.py`` compares it with a relay."""

from __future__ import annotations

import json
from pathlib import Path

from support.commands import Said, frelay_command
from support.der import san_der
from support.site import DEMO, Site


def why(site: Site, name: str, *options: str | Path, routes: str = DEMO) -> Said:
    return frelay_command("why", "-c", site.write(routes), "--cert", site.paths[name][0], *options)


def test_what_is_let_in(site: Site) -> None:
    said = why(site, "func1")
    assert (said.code, said.stderr) == (0, "")
    certificate, checks, verdict = said.stdout.split("\n\n")
    assert certificate.splitlines()[0] == "  certificate  CN=func1.demo"
    assert "serial" in certificate
    assert [line.split("  ")[1] for line in checks.splitlines()] == [
        *("key", "issuer", "purpose", "strength", "revocation"),
        *("signature and dates", "name constraints", "names", "route"),
    ]
    assert all("  ok" in line for line in checks.splitlines())
    assert verdict.splitlines() == [
        "  verdict      admitted",
        "  fits         route demo as func1, by dns:func1.demo",
        "  routes       1 of 1 have a party that these names fit",
    ]


def test_what_is_refused_in_the_handshake(site: Site) -> None:
    site.add("old", site.ca.expired(dns=["func1.demo"]))
    said = why(site, "old")
    assert (said.code, said.stderr) == (1, "")
    assert "  signature and dates  refuses      certificate has expired (at depth 0 of the chain)" in said.stdout
    assert "remedy       issue a new one" in said.stdout
    assert "  verdict      refused, certificate-expired: certificate has expired" in said.stdout
    assert "  it sees      the TLS alert certificate_expired" in said.stdout
    assert "  would fit    route demo as func1, by dns:func1.demo" in said.stdout


def test_what_is_refused_for_its_names(site: Site) -> None:
    site.add("cn", site.ca.odd(san_der(dns=[b"func1.demo."]), common_name="func1.demo"))
    said = why(site, "cn", "--route", "demo")
    assert said.code == 1
    assert "  ignored      DNS name 'func1.demo.' has the label ''" in said.stdout
    assert "fits neither party of route demo; func1 is dns:func1.demo; func2 is dns:func2.demo" in said.stdout
    assert "  it sees      REFUSED not-authorised: this certificate is not admitted here" in said.stdout
    first, second = said.stdout.splitlines()[-2:]
    assert first.startswith("  hint         func1 of route demo is dns:func1.demo: the certificate")
    assert "differs by a trailing dot" in first + second
    assert "has 'func1.demo' as its common name, which is never an identity" in first + second


def test_one_route_of_several(site: Site) -> None:
    routes = DEMO + DEMO.replace('"demo"', '"other"').replace("func1.demo", "func3.demo")
    assert why(site, "func1", routes=routes).code == 0
    assert "  verdict      admitted to route demo" in why(site, "func1", "--route", "demo", routes=routes).stdout
    said = why(site, "func1", "--route", "other", routes=routes)
    assert said.code == 1
    assert "fits neither party of route other" in said.stdout


def test_only_routes_that_fit_are_listed_of_many(site: Site) -> None:
    routes = "".join(DEMO.replace('"demo"', f'"r{n}"').replace("func1.demo", f"job{n}.demo") for n in range(40))
    said = why(site, "func2", routes=routes)
    assert said.code == 0
    assert said.stdout.count("route r") == 20
    assert "  and 20 more routes" in said.stdout
    assert "  routes       40 of 40 have a party that these names fit" in said.stdout
    assert len(json.loads(why(site, "func2", "--json", routes=routes).stdout)["routes"]) == 40


def test_plain_routes_refuse_no_certificate(site: Site) -> None:
    plain = '[[route]]\nname = "p"\nlisten = "127.0.0.1:0"\nouter = "none"\nallow_from = ["127.0.0.0/8"]\n'
    said = why(site, "func1", routes=plain)
    assert said.code == 0
    assert "not refused: no route of the file looks at certificates" in said.stdout
    said = why(site, "func1", "--route", "p", routes=DEMO + plain)
    assert said.code == 0
    assert "not refused: route p looks at no certificate" in said.stdout
    assert "1 more look at no certificate" in why(site, "func1", routes=DEMO + plain).stdout


def test_as_json(site: Site) -> None:
    said = why(site, "func1", "--json")
    assert (said.code, said.stderr) == (0, "")
    found = json.loads(said.stdout)
    assert found["admitted"] is True
    assert found["routes"][0]["party"] == "func1"
    site.add("bad", site.ca.server_only(dns=["func1.demo"]))
    said = why(site, "bad", "--json")
    assert said.code == 1
    assert json.loads(said.stdout)["refusal"]["alert"] == "unsupported_certificate"


def test_a_bad_route_file_is_told_as_by_check(site: Site) -> None:
    bad = DEMO.replace("dns:func1.demo", "func1.demo")
    said = why(site, "func1", routes=bad)
    assert (said.code, said.stdout) == (1, "")
    assert f"{site.config}:10: route[demo].func1: 'func1.demo' is not a selector" in said.messages[0]
    found = json.loads(why(site, "func1", "--json", routes=bad).stdout)
    assert found["admitted"] is None
    assert found["problems"][0]["key"] == "route[demo].func1"
    site.relay_paths[1].chmod(0o644)
    assert "tls.private_key" in why(site, "func1").messages[0]


def test_a_file_without_a_certificate(site: Site) -> None:
    said = frelay_command("why", "-c", site.write(), "--cert", site.paths["func1"][1])
    assert (said.code, said.stdout) == (1, "")
    (message,) = said.messages
    assert message.startswith(f"frelay: {site.paths['func1'][1]}: no readable certificate in it")


def test_a_wrong_call(site: Site) -> None:
    said = why(site, "func1", "--route", "nope")
    assert (said.code, said.stdout) == (2, "")
    assert "there is no route 'nope'" in said.stderr
    said = frelay_command("why", "-c", site.write())
    assert said.code == 2
    assert "Missing option '--cert'" in said.stderr


def test_help_names_every_option() -> None:
    said = frelay_command("why", "--help", env={"COLUMNS": "100"})
    assert (said.code, said.stderr) == (0, "")
    for option in ("--cert", "--config", "-c", "--route", "--json", "Exit codes: 0 admitted"):
        assert option in said.stdout
    assert "why" in frelay_command("--help").stdout
