"""A configuration as it is told to others, and read back from that: nothing is lost between two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frelay.config.dump import config_as_written, load_written
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
    told = json.loads(json.dumps(config_as_written(config)))
    found = load_written(told)
    assert plan(config, found).is_empty
    assert [route["listen"] for route in told["routes"]][-2:] == ["127.0.0.1:9003", ["0.0.0.0:9004", "[::]:9004"]]
    assert told["routes"][-1]["func2"]["dial"] == f"unix:{tmp_path}/run/db.sock"
    assert config_as_written(found) == told


@pytest.mark.parametrize("broken", ["routes", "tls", "path"])
def test_a_telling_of_another_kind_is_a_value_error(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "relay.toml"
    path.write_text(FULL)
    told = config_as_written(load(path))
    del told[broken]
    with pytest.raises(ValueError, match="is no configuration as frelay writes it"):
        load_written(told)
