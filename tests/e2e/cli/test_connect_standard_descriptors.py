"""Closed, full or non-blocking standard descriptors of ``frelay connect``, as cron and daemons may pass them."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
import trio

from support.commands import arguments, command
from support.ends import block
from support.site import Site
from support.waiting import TIMEOUT


async def by_shell(line: list[str], redirections: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command line with shell redirections."""
    with trio.fail_after(TIMEOUT * 2):
        return await trio.run_process(
            ["/bin/sh", "-c", f"{shlex.join(line)} {redirections}"],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )


async def test_a_closed_input_is_an_empty_one(site: Site) -> None:
    """And the data in the other direction arrives."""
    async with site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        async with command(arguments(site, place, "func2", "func1")) as there:
            await there.stdin.send_all(b"for you")
            await there.stdin.aclose()
            done = await by_shell(arguments(site, place, "func1", "func2"), "<&-")
            assert (done.returncode, done.stdout, done.stderr) == (0, b"for you", b"")
            assert await there.output() == b""
            assert await there.exit_code() == 0
        assert (await relay.outcome())["outcome"] == "closed"


@pytest.mark.parametrize("redirections", [">&-", "<&- >&-"])
async def test_a_closed_output_is_an_error_that_says_so(site: Site, redirections: str) -> None:
    """Before the join: data that arrived would be lost."""
    async with site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        done = await by_shell(arguments(site, place, "func1", "func2"), redirections)
        assert done.returncode == 1
        assert done.stderr.decode().startswith("frelay: standard output is closed: ")
        assert done.stderr.count(b"\n") == 1
        assert not relay.logged("waiting")


async def test_an_output_that_is_full_is_an_error_that_says_so(site: Site) -> None:
    async with site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        async with command(arguments(site, place, "func2", "func1")) as there:
            await there.stdin.send_all(b"for you")
            await there.stdin.aclose()
            done = await by_shell(arguments(site, place, "func1", "func2"), "</dev/null >/dev/full")
            assert done.returncode == 1
            assert b"standard output: No space left on device" in done.stderr


async def test_nothing_of_ours_becomes_a_standard_descriptor(site: Site) -> None:
    """With all three closed, the next opened sockets would become standard input and output, and get our messages."""
    async with site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        # There is no stderr for its messages; they must not go into the data of the pairing.
        line = arguments(site, place, "func2", "func1", "--exec", "exec 1>&-; cat >&2", "--json")
        async with command(arguments(site, place, "func1", "func2")) as here, trio.open_nursery() as nursery:
            nursery.start_soon(by_shell, line, "<&- >&- 2>&-")
            await here.say("connected")
            assert await here.output() == b""
            await here.stdin.aclose()
            assert await here.exit_code() == 0


async def test_descriptors_that_do_not_block(site: Site) -> None:
    """Another program that shares them may have set them non-blocking; EAGAIN is neither a fault nor an end."""
    data = block(1_000_000, 1)
    async with site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        ends = {"stdin": os.pipe(), "stdout": os.pipe()}
        os.set_blocking(ends["stdin"][0], False)
        os.set_blocking(ends["stdout"][1], False)
        async with command(arguments(site, place, "func2", "func1", "--exec", "cat")), trio.open_nursery() as nursery:
            process: trio.Process = await trio.lowlevel.open_process(
                arguments(site, place, "func1", "func2"), stdin=ends["stdin"][0], stdout=ends["stdout"][1]
            )
            os.close(ends["stdin"][0])
            os.close(ends["stdout"][1])

            async def put() -> None:
                async with trio.lowlevel.FdStream(ends["stdin"][1]) as pipe:
                    await pipe.send_all(data)

            nursery.start_soon(put)
            with trio.fail_after(TIMEOUT):
                async with trio.lowlevel.FdStream(ends["stdout"][0]) as pipe:
                    assert b"".join([bytes(part) async for part in pipe]) == data
                assert await process.wait() == 0
