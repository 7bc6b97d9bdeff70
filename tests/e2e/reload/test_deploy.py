"""The units in ``deploy/`` are sound: little is allowed, and all that the relay needs is."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import trio

from frelay.config.load import load
from support.admin import ADMIN, ROUTE, admin
from support.manager import Manager
from support.party import TLS_HEADER, pair
from support.relay import FRELAY_RUN
from support.site import DEMO, Site
from support.tools import tool
from support.waiting import TIMEOUT

ROOT: Final = Path(__file__).parents[3]
DEPLOY: Final = ROOT / "deploy"

# linux/prctl.h; from Linux 6.3 on.
_PR_SET_MDWE: Final = 65
_PR_GET_MDWE: Final = 66
_PR_MDWE_REFUSE_EXEC_GAIN: Final = 1
_DENY_WRITE_EXECUTE: Final = f"""
import ctypes, os, sys
if ctypes.CDLL(None).prctl({_PR_SET_MDWE}, {_PR_MDWE_REFUSE_EXEC_GAIN}, 0, 0, 0):
    sys.exit("no MDWE")
os.execv(sys.argv[1], sys.argv[1:])
"""


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("systemd-analyze"), *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def options(unit: str, section: str) -> dict[str, list[str]]:
    """The options of one section of a unit, each with all its values."""
    found: dict[str, list[str]] = {}
    here = ""
    for line in (DEPLOY / unit).read_text().splitlines():
        if line.startswith("["):
            here = line.strip("[]")
        elif here == section and "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


# --- what systemd thinks of them --------------------------------------------------------------------------------------


def test_the_exposure_is_low() -> None:
    """systemd's own score: 0 for a service that may do nothing, 10 for everything, 9.6 for one without protection."""
    done = analyze("security", "--offline=true", "--threshold=20", "--no-pager", DEPLOY / "frelay.service")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level for frelay.service" in done.stdout


@pytest.mark.parametrize("unit", ["frelay.service", "frelay.socket"])
def test_every_line_means_something_to_systemd(tmp_path: Path, unit: str) -> None:
    """A key that is misspelt or in the wrong section protects nothing, and systemd starts the service without it."""
    for name in ("frelay.service", "frelay.socket"):
        text = (DEPLOY / name).read_text()
        # systemd-analyze verify wants the file to be there; its content does not matter.
        (tmp_path / name).write_text(text.replace("/opt/frelay/bin/frelay", sys.executable))
    version = int(re.findall(r"systemd (\d+)", analyze("--version").stdout)[0])
    done = analyze("verify", "--man=false", tmp_path / unit)
    complaints = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    if version < 253:
        complaints = [line for line in complaints if "service type, ignoring: notify-reload" not in line]
    assert complaints == []


def test_the_drop_in_is_all_that_an_older_systemd_needs(tmp_path: Path) -> None:
    """systemd 252 ignores the unit's Type= with a warning; the drop-in gives it one, and a reload, that it knows."""
    (tmp_path / "frelay.service").write_text(
        (DEPLOY / "frelay.service").read_text().replace("/opt/frelay/bin/frelay", sys.executable)
    )
    (tmp_path / "frelay.service.d").mkdir()
    (tmp_path / "frelay.service.d/notify.conf").write_text((DEPLOY / "notify.conf").read_text())
    done = analyze("verify", "--man=false", tmp_path / "frelay.service")
    complaints = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert [line for line in complaints if "ignoring: notify-reload" not in line] == []
    assert options("notify.conf", "Service") == {"Type": ["notify"], "ExecReload": ["/bin/kill -HUP $MAINPID"]}
    assert options("frelay.service", "Service")["Type"] == ["notify-reload"]
    assert "ExecReload" not in options("frelay.service", "Service"), "the drop-in would add to it, not replace it"


def test_the_example_socket_is_that_of_the_example_route() -> None:
    socket = options("frelay.socket", "Socket")
    route = load(ROOT / "config/relay.toml").routes_by_name[socket["FileDescriptorName"][0]]
    assert socket["ListenStream"] == [str(route.listen)]


# --- what the relay needs ---------------------------------------------------------------------------------------------


def allowed_calls() -> frozenset[str]:
    """The system calls that the unit's filter lets through."""

    def members(name: str) -> set[str]:
        lines = analyze("syscall-filter", name).stdout.splitlines()[1:]
        words = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        return {call for word in words for call in (members(word) if word.startswith("@") else {word})}

    allowed: set[str] = set()
    for entry in options("frelay.service", "Service")["SystemCallFilter"]:
        for name in entry.lstrip("~").split():
            allowed = allowed - members(name) if entry.startswith("~") else allowed | members(name)
    return frozenset(allowed)


async def test_the_relay_makes_no_call_that_the_filter_forbids(
    site: Site, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From the start of a relay to its end, with everything that it does in between, the HTTP servers included."""
    # Not in a directory that the relay watches: each line of the trace would be an event, and each event more lines.
    trace = tmp_path_factory.mktemp("trace") / "trace"
    strace = [tool("strace"), "-f", "-qq", "-e", "signal=none", "-e", "trace=all", "-o", str(trace)]
    if (await trio.run_process([*strace, "true"], capture_stderr=True, check=False)).returncode:
        pytest.skip("this machine lets nobody trace")
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    with Manager(str(tmp_path / "notify")) as manager:
        env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1000000"}
        sections = ADMIN + '[metrics]\nlisten = "127.0.0.1:0"\n'
        async with site.process(sections=sections, launcher=strace, env=env) as relay, admin(site) as api:
            one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
            await pair(one, two)
            await one.hand_off()
            await two.hand_off()
            bulk = TLS_HEADER + bytes(8 << 20)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.send_raw, bulk)
                assert await two.receive_exactly(len(bulk)) == bulk
            one.close()
            two.close()
            one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
            await pair(one, two, modes=["tunnel"])
            await one.send(b"hello")
            assert await two.receive_exactly(5, raw=False) == b"hello"
            one.close()
            two.close()
            stranger = await site.party(relay, "stranger")
            await stranger.join()
            await stranger.refusal()
            assert (await api.put("/v1/routes/by-api", json=ROUTE)).is_success
            assert (await api.get("/v1/status")).is_success
            assert (await api.delete("/v1/routes/by-api")).is_success
            relay_pid = int(trace.read_text().split()[0])
            site.write(DEMO + DEMO.replace('"demo"', '"other"'), sections=sections)
            await relay.log("reloaded", added=["other"])
            os.kill(relay_pid, signal.SIGTERM)  # strace itself ignores the signal
            await relay.exit_code()
    text = trace.read_text()
    made = set(re.findall(r"^\d+ +(?:<\.\.\. )?([a-z_0-9]+)[( ]", text, re.MULTILINE))
    assert {"splice", "epoll_wait", "accept4"} <= made, "this is no trace of a relay"
    assert made - allowed_calls() == set()
    families = set(re.findall(r"\bsocket(?:pair)?\((AF_[A-Z0-9]+)", text))
    permitted = set(options("frelay.service", "Service")["RestrictAddressFamilies"][0].split())
    # glibc asks netlink for the address families, and does without if it may not.
    assert families - {"AF_NETLINK"} <= permitted


def test_why_memory_may_be_writable_and_executable(site: Site) -> None:
    """If this fails because the relay runs, MemoryDenyWriteExecute=yes has become possible: add it to the unit."""
    if ctypes.CDLL(None).prctl(_PR_GET_MDWE, 0, 0, 0, 0) < 0:
        pytest.skip("this kernel has no MDWE (Linux 6.3)")
    assert "MemoryDenyWriteExecute" not in options("frelay.service", "Service")
    done = subprocess.run(
        [sys.executable, "-c", _DENY_WRITE_EXECUTE, *FRELAY_RUN, "-c", site.write()],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 1
    assert "MemoryError: Cannot allocate write+execute memory for ffi.callback()" in done.stderr
