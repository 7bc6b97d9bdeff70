"""``frelay check``: exit code 0 for a good file, 1 for a bad one, 2 for wrong usage; text and JSON."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from cryptography import x509

from support.commands import frelay_command
from support.site import DEMO, Site


def test_a_good_file_is_summed_up_in_a_line(site: Site) -> None:
    config = site.write()
    said = frelay_command("check", "-c", config)
    assert (said.code, said.stderr) == (0, "")
    (line,) = said.stdout.splitlines()
    assert line.startswith(f"{config}: ok, 1 route on 1 address, certificate CN=relay until ")
    assert line.endswith("no CRL")


def test_the_summary_counts_and_knows_the_crl(site: Site) -> None:
    site.ca.write_crl(site.directory, site.ca.crl())
    second = DEMO.replace('name = "demo"', 'name = "two"').replace("127.0.0.1:0", "127.0.0.1:9002")
    third = DEMO.replace('name = "demo"', 'name = "three"').replace("127.0.0.1:0", "127.0.0.1:9002")
    said = frelay_command("check", "-c", site.write(DEMO + second + third, crl=True))
    assert said.code == 0
    assert ": ok, 3 routes on 2 addresses, certificate " in said.stdout
    assert ", CRL until " in said.stdout


def test_a_good_file_as_json(site: Site) -> None:
    config = site.write()
    said = frelay_command("check", "--json", "-c", config)
    assert (said.code, said.stderr) == (0, "")
    found = json.loads(said.stdout)
    not_after = site_not_after(site)
    assert found == {
        "ok": True,
        "problems": [],
        "warnings": [],
        "routes": ["demo"],
        "addresses": ["127.0.0.1:0"],
        "certificate_not_after": not_after,
        "crl_next_update": None,
    }


def site_not_after(site: Site) -> str:
    certificate = x509.load_pem_x509_certificate(site.relay_paths[0].read_bytes())
    return certificate.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ")


BAD = DEMO.replace("dns:func1.demo", "func1.demo") + "wait_timeot = 1\n"


def test_a_bad_file_with_all_that_is_wrong(site: Site) -> None:
    config = site.write(BAD)
    said = frelay_command("check", "-c", config)
    assert (said.code, said.stdout) == (1, "")
    first, second, last = said.messages
    assert first.startswith(f"{config}:10: route[demo].func1: 'func1.demo' is not a selector: write dns:NAME")
    assert second.startswith(f"{config}:12: route[demo].wait_timeot: is not a known key")
    assert last == f"{config}: 2 problems"


def test_a_bad_file_as_json(site: Site) -> None:
    config = site.write(BAD)
    said = frelay_command("check", "--json", "-c", config)
    assert (said.code, said.stderr) == (1, "")
    found = json.loads(said.stdout)
    assert found["ok"] is False
    assert [(one["file"], one["line"], one["key"]) for one in found["problems"]] == [
        (str(config), 10, "route[demo].func1"),
        (str(config), 12, "route[demo].wait_timeot"),
    ]
    assert all(one["message"] for one in found["problems"])


def test_the_certificates_are_looked_at_too(site: Site) -> None:
    config = site.write()
    site.relay_paths[1].chmod(0o644)
    said = frelay_command("check", "-c", config)
    assert said.code == 1
    assert f"tls.private_key: {site.relay_paths[1]} has mode 0644, others can read it" in said.messages[0]
    assert said.messages[1] == f"{config}: 1 problem"


def test_a_congestion_control_that_is_not_here(site: Site) -> None:
    said = frelay_command("check", "-c", site.write(sections='[tcp]\ncongestion_control = "vegas2"\n'))
    assert said.code == 1
    assert 'tcp.congestion_control: "vegas2" is not known to this kernel, which has ' in said.stderr
    assert "reno" in said.stderr
    assert "modprobe tcp_vegas2 may help" in said.stderr


def test_a_missing_file(tmp_path: Path) -> None:
    said = frelay_command("check", "-c", tmp_path / "relay.toml")
    assert (said.code, said.stdout) == (1, "")
    assert "there is no such file" in said.messages[0]
    found = json.loads(frelay_command("check", "--json", "-c", tmp_path / "relay.toml").stdout)
    assert [one["line"] for one in found["problems"]] == [None]


def test_a_wrong_call(tmp_path: Path) -> None:
    said = frelay_command("check", "--yaml", cwd=tmp_path)
    assert (said.code, said.stdout) == (2, "")
    assert said.messages[0].startswith("Usage: frelay check")


def test_the_file_may_come_from_the_environment(site: Site, tmp_path: Path) -> None:
    config = site.write()
    assert frelay_command("check", cwd=tmp_path, env={"FRELAY_CONFIG": str(config)}).code == 0


def test_nothing_is_bound(site: Site) -> None:
    """A relay may be running on the same addresses."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = site.write(DEMO.replace("127.0.0.1:0", f"127.0.0.1:{taken.getsockname()[1]}"))
        assert frelay_command("check", "-c", config).code == 0


def test_names_in_a_bad_file_cannot_move_the_cursor(site: Site) -> None:
    """TESTPLAN 54, for the terminal: an escape sequence in a value is shown, not obeyed."""
    config = site.write(DEMO.replace("dns:func1.demo", "dns:\\u001b[2Jfunc1"))
    said = frelay_command("check", "-c", config)
    assert said.code == 1
    assert "\x1b" not in said.stderr
