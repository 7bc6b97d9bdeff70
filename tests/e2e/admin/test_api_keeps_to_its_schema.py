"""schemathesis, with what /openapi.json says, against the real server: over the Unix socket and over mutual TLS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
import trio

from support.admin import ADMIN, admin, forwarded
from support.descriptors import open_descriptors
from support.site import DEMO, Site

EXAMPLES: Final = int(os.environ.get("FRELAY_EXAMPLES", "12"))

CHECKS: Final = (
    "--exclude-checks",
    # The schema has the types of a route's keys. It cannot say which values make a valid route.
    "positive_data_acceptance",
    "--exclude-path=/v1/events",  # it never ends
    "--exclude-path=/v1/reload",  # this test would reload all the time
)


async def fuzz(url: str, directory: Path, options: Sequence[str] = ()) -> None:
    """Run schemathesis on the API at ``url``; it must find nothing."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--url", url, "--seed", "1"]
    command += ["--max-examples", str(EXAMPLES), "--no-color", "--suppress-health-check", "all", *CHECKS, *options]
    process = await trio.run_process(command, cwd=directory, capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    output = process.stdout.decode()
    assert process.returncode == 0, output
    assert "passed" in output or "No issues found" in output, output


@pytest.mark.load
@pytest.mark.timeout(300)
async def test_over_the_unix_socket(site: Site) -> None:
    """No 500, no answer outside of the schema, no bad input accepted, and the relay is unchanged afterwards."""
    async with site.process(DEMO, sections=ADMIN) as relay, admin(site) as api:
        before = site.config.read_bytes()
        async with forwarded(site.directory / "a.sock") as port:
            await fuzz(f"http://127.0.0.1:{port}", site.directory)
        for route in (await api.get("/v1/routes")).json()["routes"]:
            if route["is_editable"]:
                assert (await api.delete(f"/v1/routes/{route['name']}")).status_code == 204
        assert [route["name"] for route in (await api.get("/v1/routes")).json()["routes"]] == ["demo"]
        assert site.config.read_bytes() == before
        assert not [event for event in relay.events if "a bug in frelay" in event["event"]]
        assert len(open_descriptors(relay.process.pid)) < 40


@pytest.mark.timeout(300)
async def test_over_mutual_tls(site: Site) -> None:
    site.add("operator", site.ca.party(dns=["operator.demo"]))
    door = '[admin]\nlisten = "127.0.0.1:0"\nallow = ["dns:operator.demo"]\n'
    async with site.process(DEMO, sections=door) as relay:
        address = (await relay.log("serving"))["admin"]
        certificate, key = site.paths["operator"]
        options = [
            "--request-cert",
            str(certificate),
            "--request-cert-key",
            str(key),
            "--tls-verify",
            str(site.ca_path),
        ]
        await fuzz(f"https://{address.replace('127.0.0.1', 'localhost')}", site.directory, options)
        assert not [event for event in relay.events if "a bug in frelay" in event["event"]]
