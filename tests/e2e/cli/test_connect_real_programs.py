"""Real programs without any knowledge of frelay use ``frelay connect``: curl, redis, and ssh by ProxyCommand."""

from __future__ import annotations

import getpass
import hashlib
import os
import shlex
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

import trio

from support.commands import arguments, command
from support.ends import block
from support.ports import free_port
from support.relay import RelayInProcess
from support.site import Site
from support.tools import running, tool, wait_listening
from support.waiting import TIMEOUT, eventually

SIZE: Final = 100 * 1024 * 1024
_BLOCK: Final = block(1024 * 1024, 7)


def digest_of_file() -> str:
    sha = hashlib.sha256()
    for _ in range(SIZE // len(_BLOCK)):
        sha.update(_BLOCK)
    return sha.hexdigest()


class _Files(BaseHTTPRequestHandler):
    """GET returns 100 MiB, PUT returns the SHA-256 of its body; connections are kept alive."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(SIZE))
        self.end_headers()
        for _ in range(SIZE // len(_BLOCK)):
            self.wfile.write(_BLOCK)

    def do_PUT(self) -> None:
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        sha, left = hashlib.sha256(), int(self.headers["Content-Length"])
        while left:
            data = self.rfile.read(min(left, 1024 * 1024))
            sha.update(data)
            left -= len(data)
        body = sha.hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def http_server() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@asynccontextmanager
async def bridged(site: Site, port: int) -> AsyncIterator[tuple[int, RelayInProcess]]:
    """A local port that leads to the service at ``port``, by way of two functions and a relay."""
    async with site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        async with (
            command(arguments(site, place, "func2", "func1", "--to", f"127.0.0.1:{port}")),
            command(arguments(site, place, "func1", "func2", "--listen", "127.0.0.1:0")) as here,
        ):
            local = (await here.say("listening"))["address"]
            yield int(local.rpartition(":")[2]), relay


async def run(line: list[str], patience: float = TIMEOUT * 3) -> bytes:
    with trio.fail_after(patience):
        done = await trio.run_process(line, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return bytes(done.stdout)


async def test_curl_downloads_and_uploads_100_mib(site: Site) -> None:
    """Three downloads one after the other, and an upload: each a pairing, and byte for byte."""
    curl = [tool("curl"), "--silent", "--show-error", "--fail", "--noproxy", "*"]
    wanted = digest_of_file()
    big = site.directory / "big"
    with http_server() as service:
        async with bridged(site, service) as (port, relay):
            for number in range(3):
                got = site.directory / f"got-{number}"
                await run([*curl, "--output", str(got), f"http://127.0.0.1:{port}/big"])
                with got.open("rb") as file:
                    assert hashlib.file_digest(file, "sha256").hexdigest() == wanted
            got.rename(big)
            answer = await run([*curl, "--upload-file", str(big), f"http://127.0.0.1:{port}/big"])
            assert answer.decode() == wanted
            await eventually(lambda: len(relay.logged("pairing ended")) == 4, "four records")
            assert {entry["outcome"] for entry in relay.logged("pairing ended")} == {"closed"}


async def test_curl_keeps_its_connection(site: Site) -> None:
    """Two downloads in one curl are one pairing."""
    with http_server() as service:
        async with bridged(site, service) as (port, relay):
            url = f"http://127.0.0.1:{port}/big"
            await run([tool("curl"), "-sSf", "--noproxy", "*", "-o", os.devnull, url, "-o", os.devnull, url])
            await eventually(lambda: len(relay.logged("pairing ended")) == 1, "one record")
            assert relay.logged("pairing ended")[0]["bytes_func2_to_func1"] > 2 * SIZE


async def test_redis_answers(site: Site) -> None:
    """A real redis-server, with its client: small messages both ways, and a value of a megabyte."""
    server, client = tool("redis-server"), tool("redis-cli")
    service = free_port()
    options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(site.directory)]
    async with running([server, "--port", str(service), *options]):
        await wait_listening(service)
        async with bridged(site, service) as (port, _):
            line = [client, "-h", "127.0.0.1", "-p", str(port)]
            assert await run([*line, "ping"]) == b"PONG\n"
            assert await run([*line, "-r", "500", "incr", "n"]) == b"".join(b"%d\n" % n for n in range(1, 501))
            value = site.directory / "value"
            value.write_bytes(b"v" * 1_000_000)
            with trio.fail_after(TIMEOUT * 3), value.open("rb") as file:
                await trio.run_process([*line, "-x", "set", "big"], stdin=file, capture_stdout=True)
            assert await run([*line, "strlen", "big"]) == b"1000000\n"


async def test_ssh_goes_by_proxy_command(site: Site) -> None:
    """``ssh -o ProxyCommand='frelay connect ...'`` to an sshd behind ``--to``: a command, its input, its exit code."""
    sshd, ssh, keygen = tool("sshd"), tool("ssh"), tool("ssh-keygen")
    directory = site.directory / "ssh"
    directory.mkdir(mode=0o700)
    for name in ("host", "user"):
        await run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)])
    (directory / "authorized").write_bytes((directory / "user.pub").read_bytes())
    known = (directory / "host.pub").read_text().split()[:2]
    (directory / "known").write_text(f"behind-frelay {' '.join(known)}\n")
    if os.geteuid() == 0:
        # If sshd never ran as a service here, this directory does not exist yet.
        await trio.Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    service = free_port()
    config = directory / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1:{service}\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/authorized\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    async with running([sshd, "-D", "-f", str(config)]):
        await wait_listening(service)
        async with site.relay() as relay:
            place = f"127.0.0.1:{relay.port()}"
            async with command(arguments(site, place, "func2", "func1", "--to", f"127.0.0.1:{service}")):
                proxy = shlex.join(arguments(site, place, "func1", "func2"))
                line = [ssh, "-F", "none", "-i", f"{directory}/user", "-o", f"UserKnownHostsFile={directory}/known"]
                line += ["-o", "BatchMode=yes", "-o", f"ProxyCommand={proxy}", f"{getpass.getuser()}@behind-frelay"]
                data = block(3_000_000, 3)
                with trio.fail_after(TIMEOUT * 3):
                    done = await trio.run_process(
                        [*line, "sha256sum; exit 7"], stdin=data, capture_stdout=True, capture_stderr=True, check=False
                    )
                assert done.returncode == 7, done.stderr.decode()
                assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
            await eventually(lambda: len(relay.logged("pairing ended")) == 1, "the pairing has ended")
