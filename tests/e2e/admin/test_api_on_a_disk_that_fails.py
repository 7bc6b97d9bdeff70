"""TESTPLAN 52: after a full disk or a crash during a write, the old file is intact and the old route in force."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

import pytest
import trio

from support.admin import ADMIN, admin, can_bind, route_body
from support.ports import reserved_port
from support.site import DEMO, Site


@pytest.mark.parametrize("call", ["fsync", "rename"])
async def test_a_full_disk_changes_nothing(site: Site, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The answer is 507 with the reason, the port is free again, and the next try with free space succeeds."""

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with reserved_port() as port:
        async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
            await api.put("/v1/routes/two", json=route_body(wait_timeout=5))
            path = site.directory / "routes.d" / "two.toml"
            before = path.read_bytes()
            with monkeypatch.context() as patch:
                patch.setattr(f"frelay.config.route_files.os.{call}", fail)
                answer = await api.put("/v1/routes/two", json=route_body(wait_timeout=6, listen=f"127.0.0.1:{port}"))
                assert (answer.status_code, answer.json()["error"]) == (507, "not-writable")
                assert "No space left" in answer.json()["message"]
                added = await api.put("/v1/routes/three", json=route_body(listen=f"127.0.0.1:{port}"))
                assert added.status_code == 507
            assert path.read_bytes() == before
            assert [file.name for file in path.parent.iterdir()] == ["two.toml"]
            assert relay.relay.routes["two"].config.limits.wait_timeout == 5
            assert "three" not in relay.relay.routes
            assert can_bind(("127.0.0.1", port))
            assert relay.relay.last_reload_error is None
            again = await api.put("/v1/routes/three", json=route_body(listen=f"127.0.0.1:{port}"))
            assert again.status_code == 201


async def test_a_directory_that_cannot_be_written(site: Site) -> None:
    """If routes_dir is a file, the loader of the configuration says so, with its path."""
    async with site.relay(DEMO, sections=ADMIN), admin(site) as api:
        (site.directory / "routes.d").write_text("in the way")
        answer = await api.put("/v1/routes/two", json=route_body())
        assert answer.status_code in (409, 507)
        assert "routes.d" in str(answer.json())


async def test_what_a_crash_leaves_behind_is_no_route(site: Site) -> None:
    """A kill between write and rename leaves a hidden file, which the relay never reads."""
    directory = site.directory / "routes.d"
    directory.mkdir()
    (directory / ".two.x7f3.tmp").write_text('name = "two"\nlisten = "127')
    async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
        assert list(relay.relay.routes) == ["demo"]
        assert (await api.put("/v1/routes/two", json=route_body())).status_code == 201


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of one's own takes root")
async def test_a_disk_that_is_really_full(site: Site) -> None:
    """On a full tmpfs of 1 MiB: 507 and the old file is whole; after space was freed, the new file is whole."""
    directory = site.directory / "routes.d"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    mounted = await trio.run_process(command, check=False)
    if mounted.returncode != 0:
        if os.environ.get("CI"):
            pytest.fail("no tmpfs can be mounted here")
        pytest.skip("no tmpfs can be mounted here")
    try:
        async with site.relay(DEMO, sections=ADMIN) as relay, admin(site) as api:
            await api.put("/v1/routes/two", json=route_body(wait_timeout=5))
            before = (directory / "two.toml").read_bytes()
            filler = directory / ".filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
            answer = await api.put("/v1/routes/two", json=route_body(wait_timeout=6))
            assert answer.status_code == 507
            assert (directory / "two.toml").read_bytes() == before
            assert relay.relay.routes["two"].config.limits.wait_timeout == 5
            filler.unlink()
            assert (await api.put("/v1/routes/two", json=route_body(wait_timeout=6))).status_code == 200
    finally:
        await trio.run_process(["umount", str(directory)])
