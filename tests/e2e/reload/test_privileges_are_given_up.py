"""A relay that root started is not root any more when its first connection comes, and nothing reads its memory.

The tests become ``nobody``, so they need root, which CI has. Python itself may lie where only root can read, such as a
pyenv in root's home; then the relay is started in a mount namespace in which that directory is open.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from frelay.config.load import load
from frelay.errors import ConfigError
from frelay.relay.prepare import prepare
from support.admin import ADMIN, ROUTE, admin
from support.party import pair
from support.relay import FRELAY_RUN
from support.site import DEMO, Site
from support.waiting import TIMEOUT

NOBODY: Final = pwd.getpwnam("nobody")
USER: Final = '[relay]\nuser = "nobody"\n'
NET_BIND_SERVICE: Final = 1 << 10

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

# In this namespace every directory above $1 is open; nothing has changed outside of it.
_OPEN: Final = """
set -e
place=$1 closed=$2 && shift 2
aside=$(mktemp -d)
mount --bind "$place" "$aside"
mount -t tmpfs -o mode=755 closed "$closed"
mkdir -p "$place"
mount --move "$aside" "$place"
rmdir "$aside"
exec "$@"
"""


def launcher() -> list[str]:
    """What to write before a command, so that ``nobody`` can read the Python that it runs."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    closed = next((place for place in reversed(stdlib.parents) if not place.stat().st_mode & stat.S_IXOTH), None)
    if closed is None:
        return []
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", _OPEN, "sh", sys.base_prefix, str(closed)]


@pytest.fixture
def site() -> Iterator[Site]:
    """As in other tests, but in a directory that ``nobody`` can reach, with files that ``nobody`` owns."""
    # pytest's own directories are closed to all others.
    directory = Path(tempfile.mkdtemp(prefix="frelay-"))
    try:
        site = Site(directory)
        give(site)
        yield site
    finally:
        shutil.rmtree(directory)


def give(site: Site, uid: int = NOBODY.pw_uid) -> None:
    for path in (site.directory, *site.directory.iterdir()):
        os.chown(path, uid, NOBODY.pw_gid)


def low_address() -> str:
    """A loopback address with a port below 1024, which only a process with the capability may bind."""
    return "127.{}.{}.{}:443".format(*(1 + byte % 254 for byte in secrets.token_bytes(3)))


def are_free(port: int) -> bool:
    return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= port


def at(address: str, name: str = "demo") -> str:
    return DEMO.replace("127.0.0.1:0", address).replace('"demo"', f'"{name}"')


def statuses(pid: int) -> list[dict[str, list[str]]]:
    """``/proc/PID/status`` of each thread, since each has capabilities of its own."""
    texts = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [
        {key: value.split() for key, _, value in (line.partition(":") for line in text.splitlines())} for text in texts
    ]


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def capabilities(status: dict[str, list[str]]) -> dict[str, int]:
    return {name: int(status[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")}


def assert_is_nobody(pid: int, capability: int) -> None:
    found = statuses(pid)
    assert len(found) > 1, "there are threads, or this looks at less than it thinks"
    for status in found:
        assert status["Uid"] == [str(NOBODY.pw_uid)] * 4
        assert status["Gid"] == [str(NOBODY.pw_gid)] * 4
        assert {int(group) for group in status["Groups"]} == set(os.getgrouplist("nobody", NOBODY.pw_gid))
        assert capabilities(status) == {"CapInh": 0, "CapPrm": capability, "CapEff": capability, "CapAmb": 0}


def assert_keeps_its_memory_to_itself(pid: int) -> None:
    assert all(status["NoNewPrivs"] == ["1"] for status in statuses(pid))
    (limit,) = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core file size" in line]
    assert limit.split()[4:6] == ["0", "0"]
    # proc(5): the files in /proc of a process that may not be dumped belong to root.
    assert Path(f"/proc/{pid}/status").stat().st_uid == 0


# --- who it is --------------------------------------------------------------------------------------------------------


async def test_it_is_nobody_with_no_capability_at_all(site: Site) -> None:
    async with site.process(sections=USER, launcher=launcher()) as relay:
        # It still sees of its own descriptors what frelay.pairing.readiness needs.
        assert not relay.logged("small messages cost more than they should")
        assert_is_nobody(relay.process.pid, 0)
        assert_keeps_its_memory_to_itself(relay.process.pid)
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two)
        site.write(DEMO + at("127.0.0.1:0", "other"), sections=USER)
        relay.signal(signal.SIGHUP)
        await relay.log("reloaded", kept=1, added=["other"])
        assert_is_nobody(relay.process.pid, 0)
        relay.signal(signal.SIGTERM)
        site.hang_up()
        assert await relay.exit_code() == 0


async def test_a_low_port_is_bound_again_by_a_reload(site: Site) -> None:
    """The right to bind low ports is the only one of root's that it keeps."""
    first, second = low_address(), low_address()
    async with site.process(at(first), sections=USER, launcher=launcher()) as relay:
        assert_is_nobody(relay.process.pid, NET_BIND_SERVICE)
        site.write(at(first) + at(second, "other"), sections=USER)
        relay.signal(signal.SIGHUP)
        assert (await relay.log("listening", route="other"))["address"] == second
        assert_is_nobody(relay.process.pid, NET_BIND_SERVICE)
        assert_keeps_its_memory_to_itself(relay.process.pid)


@pytest.mark.skipif(are_free(443), reason="no port is reserved on this machine")
async def test_without_a_low_port_at_start_there_is_none_later(site: Site) -> None:
    """The reload says so, with the old configuration whole."""
    address = low_address()
    async with site.process(sections=USER, launcher=launcher()) as relay:
        site.write(DEMO + at(address, "low"), sections=USER)
        relay.signal(signal.SIGHUP)
        refused = await relay.log("reload refused, the old configuration stays")
        assert f"cannot listen on {address}: Permission denied" in refused["problem"]
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))


async def test_the_api_is_nobodys_too(site: Site) -> None:
    """Its socket, the route files that it writes, and the count of the process's own descriptors work."""
    async with site.process(sections=USER + ADMIN, launcher=launcher()) as relay, admin(site) as api:
        socket = (site.directory / "a.sock").stat()
        assert (socket.st_uid, stat.S_IMODE(socket.st_mode)) == (NOBODY.pw_uid, 0o600)
        assert (await api.put("/v1/routes/by-api", json=ROUTE)).is_success
        assert (site.directory / "routes.d/by-api.toml").stat().st_uid == NOBODY.pw_uid
        assert (await api.get("/v1/status")).json()["descriptors"]["open"] > 3
        relay.signal(signal.SIGTERM)
        assert await relay.exit_code() == 0
    assert not (site.directory / "a.sock").exists()


async def test_its_workers_are_nobody_too(site: Site) -> None:
    """They have the relay's key in their memory, but not its one capability: they are given their sockets."""
    address = low_address()
    async with site.process(at(address), sections=USER, workers=2, launcher=launcher()) as relay:
        assert_is_nobody(relay.process.pid, NET_BIND_SERVICE)
        workers = children(relay.process.pid)
        assert len(workers) == 2
        for pid in workers:
            assert_is_nobody(pid, 0)
            assert_keeps_its_memory_to_itself(pid)


async def test_who_is_that_user_already_need_not_become_it(site: Site) -> None:
    """As when systemd starts it with User= and the same file."""
    already = ["setpriv", "--reuid=nobody", "--regid", str(NOBODY.pw_gid), "--init-groups"]
    async with site.process(sections=USER, launcher=[*launcher(), *already]) as relay:
        assert_is_nobody(relay.process.pid, 0)
        assert_keeps_its_memory_to_itself(relay.process.pid)


async def test_its_memory_is_its_own_without_a_user_as_well(site: Site) -> None:
    already = ["setpriv", "--reuid=nobody", "--regid", str(NOBODY.pw_gid), "--init-groups"]
    async with site.process(launcher=[*launcher(), *already]) as relay:
        assert_keeps_its_memory_to_itself(relay.process.pid)


# --- what is said -----------------------------------------------------------------------------------------------------


def failed_start(site: Site, *before: str) -> str:
    """The messages of a relay that does not start."""
    done = subprocess.run(
        [*launcher(), *before, *FRELAY_RUN, "-c", site.config],
        capture_output=True,
        text=True,
        timeout=TIMEOUT * 3,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_key_that_it_cannot_read_is_named_with_the_remedy(site: Site) -> None:
    """Root could load it at the start, but the first reload could not."""
    site.write(sections=USER)
    key = site.relay_paths[1]
    os.chown(key, 0, 0)
    (message,) = failed_start(site).splitlines()
    assert message.startswith(f"frelay: {site.config}: relay.user: {key} cannot be read by nobody")
    assert f"chown nobody {key}" in message


def test_every_file_that_it_cannot_read_at_once(site: Site) -> None:
    site.write(sections=USER)
    os.chmod(site.directory, 0o700)
    os.chown(site.directory, 0, 0)
    messages = failed_start(site).splitlines()
    assert len(messages) == 5  # the route file, routes_dir, the certificate, the key and the CA
    assert all("cannot be read by nobody" in message for message in messages)


def test_a_program_that_it_cannot_read_is_named(site: Site) -> None:
    """Otherwise a module that is needed months later could not be loaded."""
    if not launcher():
        pytest.skip("everybody can read this Python")
    site.write(sections=USER)
    done = subprocess.run(
        [*FRELAY_RUN, "-c", site.config], capture_output=True, text=True, timeout=TIMEOUT * 3, check=False
    )
    assert done.returncode == 1
    assert "a part of this program, cannot be read by nobody: install it elsewhere" in done.stderr


def test_who_is_not_root_is_told_what_to_do(site: Site) -> None:
    site.write(sections=USER)
    give(site, uid=2)
    os.chown(site.config, 2, 2)
    (message,) = failed_start(site, "setpriv", "--reuid=2", "--regid=2", "--clear-groups").splitlines()
    assert 'relay.user: only root can become "nobody", and this is uid 2: start it as root, or leave' in message


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ("nobody-of-this-name", 'there is no user "nobody-of-this-name" on this machine; useradd --system'),
        ("root", '"root" is root: name a user that may do less'),
    ],
)
def test_a_user_that_cannot_be_meant(site: Site, user: str, said: str) -> None:
    """At the start and by `frelay check`; the next test is about a reload."""
    config = load(site.write(sections=f'[relay]\nuser = "{user}"\n'))
    with pytest.raises(ConfigError) as refused:
        prepare(config)
    (problem,) = refused.value.problems
    assert (problem.file, problem.key) == (site.config, "relay.user")
    assert problem.message.startswith(said)


async def test_another_user_waits_for_a_restart(site: Site) -> None:
    """A reload cannot become root again; but it takes over all the rest of the file."""
    async with site.process(sections=USER, launcher=launcher()) as relay:
        site.write(DEMO + at("127.0.0.1:0", "other"), sections=USER.replace("nobody", "daemon"))
        relay.signal(signal.SIGHUP)
        await relay.log("reloaded", added=["other"])
        assert_is_nobody(relay.process.pid, 0)
        site.write(DEMO, sections=USER.replace("nobody", "nobody-of-this-name"))
        relay.signal(signal.SIGHUP)
        refused = await relay.log("reload refused, the old configuration stays")
        assert "there is no user" in refused["problem"]


# --- a key that one group may read ------------------------------------------------------------------------------------

FS_GROUP: Final = 5000
UID_OF_A_POD: Final = 1000770


def mount_with_fs_group(site: Site, gid: int) -> None:
    """Files as Kubernetes mounts a Secret with ``fsGroup``: owned by root and that group, and read-only."""
    site.directory.chmod(0o755)
    os.chown(site.directory, 0, 0)
    for path in (*site.paths["func1"], *site.relay_paths, site.ca_path):
        os.chown(path, 0, gid)
        path.chmod(0o440)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_pod_reads_its_key_by_its_group(site: Site, workers: int) -> None:
    mount_with_fs_group(site, FS_GROUP)
    pod = ["setpriv", "--reuid", str(UID_OF_A_POD), "--regid", str(UID_OF_A_POD), "--groups", str(FS_GROUP)]
    async with site.process(launcher=[*launcher(), *pod], workers=workers) as relay:
        assert os.stat(f"/proc/{relay.process.pid}").st_uid in (0, UID_OF_A_POD)
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        relay.signal(signal.SIGHUP)
        await relay.log("reloaded")


async def test_the_groups_that_count_are_those_of_the_user_to_become(site: Site) -> None:
    mount_with_fs_group(site, NOBODY.pw_gid)
    prepare(load(site.write(sections=USER)))
    with pytest.raises(ConfigError, match=f"has mode 0440, others can read it; .* group {NOBODY.pw_gid}"):
        prepare(load(site.write()))
    async with site.process(sections=USER, launcher=launcher()) as relay:
        assert_is_nobody(relay.process.pid, 0)


def test_a_group_that_root_is_in_and_the_user_is_not(site: Site) -> None:
    mount_with_fs_group(site, os.getegid())
    prepare(load(site.write()))
    with pytest.raises(ConfigError, match="has mode 0440"):
        prepare(load(site.write(sections=USER)))


def test_whatever_is_wider_is_refused_with_the_remedy(site: Site) -> None:
    mount_with_fs_group(site, os.getegid())
    for mode in (0o460, 0o444, 0o644, 0o660):
        site.relay_paths[1].chmod(mode)
        with pytest.raises(ConfigError, match=f"has mode {mode:04o}, others can read it; chmod 600 .* mode 0640"):
            prepare(load(site.write()))
