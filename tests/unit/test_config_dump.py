"""A configuration is dumped and loaded again without a loss, as between two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frelay.config.dump import dump_config, load_dump
from frelay.config.load import load
from frelay.config.plan import plan

FULL = """
[relay]
name = "r"
drain_timeout = 7
[tls]
certificate = "a.pem"
private_key = "a.key"
client_ca = "ca.pem"
crl = "crl.pem"
[limits]
ping_interval = 3
[tcp]
keepalive = [40, 5, 2]
[metrics]
listen = "127.0.0.1:9464"
[[group]]
name = "workers"
parties = ["uri:spiffe://acme/jobs/*", "dns:w.acme"]
[[route]]
name = "one"
listen = "127.0.0.1:9001"
func1 = "group:workers"
func2 = ["dns:func2.acme"]
require_inner_tls = "always"
wait_timeout = 5
[[route]]
name = "mesh"
listen = "127.0.0.1:0"
outer = "none"
allow_from = ["10.0.0.0/8"]
[[route]]
name = "database"
listen = "127.0.0.1:9003"
func1 = "group:workers"
func2 = { dial = "database.internal:5432" }
[[route]]
name = "here"
listen = ["0.0.0.0:9004", "[::]:9004"]
func1 = "group:workers"
func2 = { dial = "unix:run/db.sock" }
"""

ADMINS = {
    "on a Unix socket": '[admin]\nlisten = "unix:frelay.sock"\n',
    "on TCP": '[admin]\nlisten = "127.0.0.1:9443"\nallow = ["dns:operator.acme"]\n',
    "nowhere": "",
}


@pytest.mark.parametrize("admin", ADMINS)
def test_what_is_told_is_what_is_read_back(tmp_path: Path, admin: str) -> None:
    path = tmp_path / "relay.toml"
    path.write_text(FULL + ADMINS[admin])
    config = load(path)
    dumped = json.loads(json.dumps(dump_config(config)))
    found = load_dump(dumped)
    assert plan(config, found).is_empty
    assert [route["listen"] for route in dumped["routes"]][-2:] == ["127.0.0.1:9003", ["0.0.0.0:9004", "[::]:9004"]]
    assert dumped["routes"][-1]["func2"]["dial"] == f"unix:{tmp_path}/run/db.sock"
    assert dump_config(found) == dumped


@pytest.mark.parametrize("broken", ["routes", "tls", "path"])
def test_a_dump_of_another_form_is_a_value_error(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "relay.toml"
    path.write_text(FULL)
    dumped = dump_config(load(path))
    del dumped[broken]
    with pytest.raises(ValueError, match="is not the form in which frelay writes a configuration"):
        load_dump(dumped)
