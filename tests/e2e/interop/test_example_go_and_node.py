"""The functions in Go and Node.js that people copy from ``examples/`` meet each other and Python functions.

They run as processes, and carry more than the socket buffers hold in both directions at once; each direction is ended
by itself.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding

import frelay
from frelay.pki.files import certificates_pem
from frelay.protocol.identity import spki_of_certificate
from support.certs import TestAuthority
from support.ends import block
from support.party import frame
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.tools import tool
from support.waiting import TIMEOUT
from support.wires import fake_relay, read_frame

# The first build may have to compile Go's standard library.
pytestmark = pytest.mark.timeout(300)

ROOT: Final = Path(__file__).parents[3]
EXAMPLES: Final = ROOT / "examples"
ANY_SIZE: Final = 1024 * 1024 + 7

T = TypeVar("T")
Runtime = Literal["go", "node", "python"]
HandOff = Literal["handoff", "ticket"]
RUNTIMES: Final[tuple[Runtime, ...]] = ("go", "node", "python")
OURS: Final[tuple[Runtime, ...]] = ("go", "node")
HAND_OFFS: Final[tuple[HandOff, ...]] = ("handoff", "ticket")

PYTHON: Final = """
import shutil, sys, frelay
address, cert, key, ca, peer, mode, *key_and_partner = sys.argv[1:]
options = dict(zip(("meet", "partner"), key_and_partner))
with frelay.connect(address, cert=cert, key=key, ca=ca, peer=peer, mode=mode, wait=60, **options) as wire:
    wire.sendall(sys.stdin.buffer.read())
    wire.send_eof()
    shutil.copyfileobj(wire.makefile("rb"), sys.stdout.buffer)
"""


def go_environment(directory: Path) -> dict[str, str]:
    """The environment for a build without network and without the user's settings."""
    found = {**os.environ, "GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOWORK": "off", "GOTOOLCHAIN": "local"}
    if "HOME" not in found:
        found["GOCACHE"] = str(directory / "cache")
    return found


@pytest.fixture(scope="session")
def go_party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in Go, compiled."""
    directory = tmp_path_factory.mktemp("go-party")
    binary = directory / "frelay-party"
    subprocess.run(
        [tool("go"), "build", "-o", str(binary), "."],
        cwd=EXAMPLES / "go",
        env=go_environment(directory),
        check=True,
    )
    return binary


@dataclass
class Functions:
    """Starts functions of any runtime."""

    site: Site
    request: pytest.FixtureRequest

    def command(
        self, runtime: Runtime, port: int, name: str, peer: str, hand_off: HandOff, wait: int, *by_key: str
    ) -> list[str]:
        """``by_key`` is nothing, a key, or a key and a partner."""
        cert, key = self.site.paths[name]
        address = f"localhost:{port}"
        if runtime == "python":
            arguments = [address, str(cert), str(key), str(self.site.ca_path), peer, hand_off, *by_key]
            return [sys.executable, "-c", PYTHON, *arguments]
        if runtime == "go":
            command, dash, seconds = [str(self.request.getfixturevalue("go_party"))], "-", f"{wait}s"
        else:
            command, dash, seconds = [tool("node"), str(EXAMPLES / "node/party.mjs")], "--", str(wait)
        options = {
            "relay": address,
            "cert": cert,
            "key": key,
            "ca": self.site.ca_path,
            "peer": peer,
            "wait": seconds,
            **dict(zip(("meet", "partner"), by_key, strict=False)),
        }
        for option, value in options.items():
            command += [dash + option, str(value)]
        return [*command, f"{dash}ticket"] if hand_off == "ticket" else command

    async def run(
        self,
        runtime: Runtime,
        relay: RelayInProcess,
        name: str,
        data: bytes = b"",
        *,
        peer: str | None = None,
        hand_off: HandOff = "handoff",
        wait: int = 60,
        by_key: tuple[str, ...] = (),
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a function with ``data`` on its standard input, to its end."""
        other = {"func1": "dns:func2.demo", "func2": "dns:func1.demo"}
        peer = peer or other.get(name, "dns:func2.demo")
        command = self.command(runtime, relay.port(), name, peer, hand_off, wait, *by_key)
        # A function in Python must import the frelay of this checkout.
        run = partial(trio.run_process, command, stdin=data, capture_stdout=True, capture_stderr=True, check=False)
        return await run(env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture
def functions(site: Site, request: pytest.FixtureRequest) -> Functions:
    # Build first, so that nothing waits for it.
    for name in ("go", "node"):
        if name in request.node.callspec.params.values():
            tool(name)
    if "go" in request.node.callspec.params.values():
        request.getfixturevalue("go_party")
    return Functions(site, request)


async def meet(
    functions: Functions, relay: RelayInProcess, one: tuple[Runtime, HandOff], two: tuple[Runtime, HandOff]
) -> None:
    """Pair func1 and func2; each must receive all bytes of the other."""
    sent = {"func1": block(ANY_SIZE, 1), "func2": block(ANY_SIZE + 4, 2)}
    ended: dict[str, subprocess.CompletedProcess[bytes]] = {}

    async def run(name: str, runtime: Runtime, hand_off: HandOff) -> None:
        ended[name] = await functions.run(runtime, relay, name, sent[name], hand_off=hand_off)

    with trio.fail_after(TIMEOUT * 3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "func1", *one)
            nursery.start_soon(run, "func2", *two)
    assert [(ended[name].returncode, ended[name].stderr) for name in sent if ended[name].returncode] == []
    assert ended["func1"].stdout == sent["func2"]
    assert ended["func2"].stdout == sent["func1"]


@pytest.mark.parametrize("hand_off", HAND_OFFS)
@pytest.mark.parametrize("two", RUNTIMES)
@pytest.mark.parametrize("one", OURS)
async def test_all_bytes_cross(functions: Functions, one: Runtime, two: Runtime, hand_off: HandOff) -> None:
    """``one`` is the client of the inner TLS, ``two`` its server."""
    async with functions.site.relay() as relay:
        await meet(functions, relay, (one, hand_off), (two, hand_off))
        assert (await relay.log("pairing ended"))["outcome"] == "closed"
        modes = await relay.log("handed off")
        assert (modes["func1_mode"], modes["func2_mode"]) == (hand_off, hand_off)


@pytest.mark.parametrize("hand_off", HAND_OFFS)
@pytest.mark.parametrize("two", OURS)
async def test_all_bytes_cross_with_python_as_the_tls_client(
    functions: Functions, two: Runtime, hand_off: HandOff
) -> None:
    async with functions.site.relay() as relay:
        await meet(functions, relay, ("python", hand_off), (two, hand_off))
        assert (await relay.log("pairing ended"))["outcome"] == "closed"


@pytest.mark.parametrize(("one", "two"), [("go", "python"), ("node", "python"), ("node", "go"), ("python", "go")])
async def test_an_issuing_authority_is_enough_as_ca(functions: Functions, one: Runtime, two: Runtime) -> None:
    """An intermediate works as anchor for both kinds of TLS, but not for Node.js as a TLS server."""
    site = functions.site
    issuing = TestAuthority.root_for_intermediates().intermediate("issuing CA")
    issuing.relay().write(site.directory, "relay")
    for name in ("func1", "func2"):
        site.add(name, issuing.party(dns=[f"{name}.demo"]))
    site.ca_path.write_bytes(certificates_pem([issuing.authority.certificate]))
    async with site.relay() as relay:
        await meet(functions, relay, (one, "handoff"), (two, "handoff"))


@pytest.mark.parametrize("two", OURS)
@pytest.mark.parametrize("one", OURS)
async def test_hand_off_and_ticket_meet(functions: Functions, one: Runtime, two: Runtime) -> None:
    async with functions.site.relay() as relay:
        await meet(functions, relay, (one, "handoff"), (two, "ticket"))
        modes = await relay.log("handed off")
        assert (modes["func1_mode"], modes["func2_mode"]) == ("handoff", "ticket")


@pytest.mark.parametrize("hand_off", HAND_OFFS)
@pytest.mark.parametrize("runtime", OURS)
async def test_an_answer_arrives_after_the_question_has_ended(
    functions: Functions, runtime: Runtime, hand_off: HandOff
) -> None:
    """TESTPLAN 25: the other direction begins only when the example has ended its own."""
    answer = block(ANY_SIZE, 3)
    script = """
import sys, frelay
address, cert, key, ca, peer = sys.argv[1:]
with frelay.connect(address, cert=cert, key=key, ca=ca, peer=peer, wait=60) as wire:
    question = wire.makefile("rb").read()
    assert question == b"question", question
    wire.sendall(sys.stdin.buffer.read())
"""
    site = functions.site
    async with site.relay() as relay:
        cert, key = site.paths["func2"]
        arguments = [f"localhost:{relay.port()}", str(cert), str(key), str(site.ca_path), "dns:func1.demo"]
        with trio.fail_after(TIMEOUT * 3):
            async with trio.open_nursery() as nursery:
                command = [sys.executable, "-c", script, *arguments]
                nursery.start_soon(
                    partial(trio.run_process, command, stdin=answer, env={**os.environ, "PYTHONPATH": str(ROOT)})
                )
                asked = await functions.run(runtime, relay, "func1", b"question", hand_off=hand_off)
        assert (asked.returncode, asked.stdout == answer) == (0, True), asked.stderr


@pytest.mark.parametrize("two", OURS)
@pytest.mark.parametrize("one", OURS)
async def test_somebody_else_gets_nothing(functions: Functions, one: Runtime, two: Runtime) -> None:
    """The relay reports func2, but the function expects func3: it sends nothing, and both learn it at once."""
    async with functions.site.relay() as relay:
        ended: dict[str, subprocess.CompletedProcess[bytes]] = {}

        async def run(name: str, runtime: Runtime, peer: str) -> None:
            ended[name] = await functions.run(runtime, relay, name, b"for func3 alone", peer=peer, wait=600)

        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, "func1", one, "dns:func3.demo")
                nursery.start_soon(run, "func2", two, "dns:func1.demo")
        assert ended["func1"].returncode == 1
        assert b"func2.demo" in ended["func1"].stderr
        assert b"dns:func3.demo was expected" in ended["func1"].stderr
        assert ended["func2"].stdout == b""


@pytest.mark.parametrize("runtime", OURS)
async def test_a_certificate_of_another_kind_is_not_the_name(functions: Functions, runtime: Runtime) -> None:
    """The certificate has the expected DNS name in every field except the DNS names."""
    site = functions.site
    site.add("func2", site.ca.text_elsewhere("func2.demo"))
    pin = spki_of_certificate(site.credentials["func2"].certificate.public_bytes(Encoding.DER))
    routes = DEMO.replace("dns:func2.demo", str(pin))
    async with site.relay(routes) as relay:
        ended: dict[str, subprocess.CompletedProcess[bytes]] = {}

        async def run(name: str) -> None:
            ended[name] = await functions.run(runtime, relay, name, b"secret", wait=600)

        with trio.fail_after(TIMEOUT * 3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, "func1")
                nursery.start_soon(run, "func2")
        assert ended["func1"].returncode == 1
        assert b"dns:func2.demo was expected" in ended["func1"].stderr
        assert ended["func2"].stdout == b""


@pytest.mark.parametrize("runtime", OURS)
async def test_a_peer_with_a_spiffe_id_is_known_by_it(functions: Functions, runtime: Runtime) -> None:
    site = functions.site
    for name in ("func1", "func2"):
        site.add(name, site.ca.party(uris=[f"spiffe://acme/jobs/{name}"]))
    routes = DEMO.replace("dns:func1.demo", "uri:spiffe://acme/jobs/func1")
    routes = routes.replace("dns:func2.demo", "uri:spiffe://acme/jobs/func2")
    async with site.relay(routes) as relay:
        ended: dict[str, subprocess.CompletedProcess[bytes]] = {}

        async def run(name: str, other: str) -> None:
            ended[name] = await functions.run(
                runtime, relay, name, name.encode(), peer=f"uri:spiffe://acme/jobs/{other}"
            )

        with trio.fail_after(TIMEOUT * 3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, "func1", "func2")
                nursery.start_soon(run, "func2", "func1")
        assert (ended["func1"].returncode, ended["func1"].stdout) == (0, b"func2"), ended["func1"].stderr
        assert (ended["func2"].returncode, ended["func2"].stdout) == (0, b"func1"), ended["func2"].stderr


@pytest.mark.parametrize("runtime", OURS)
async def test_a_refusal_says_why(functions: Functions, runtime: Runtime) -> None:
    functions.site.add("func3", functions.site.ca.party(dns=["func3.demo"]))
    async with functions.site.relay() as relay:
        with trio.fail_after(TIMEOUT):
            ended = await functions.run(runtime, relay, "func3")
        assert (ended.returncode, b"not-authorised" in ended.stderr) == (3, True), ended.stderr


@pytest.mark.parametrize("runtime", OURS)
async def test_what_a_relay_says_steers_no_terminal(functions: Functions, runtime: Runtime) -> None:
    """It may end the function only by an error."""
    said = {
        "text": frame("REFUSED", {"code": "limit", "reason": "a\x1b[2J\nfrelay: b\u202e\x9b", "retry_after": 1e308}),
        "no object": frame("PING", b"null"),
        "no JSON": frame("WAITING", b"{" * 4000),
        "no text": frame("REFUSED", b'{"code": 1, "reason": {"a": "\\u001b"}, "retry_after": "x"}'),
    }
    for what, frames in said.items():

        def script(tls: ssl.SSLSocket, frames: bytes = frames) -> None:
            read_frame(tls)
            tls.sendall(frames)

        with fake_relay(functions.site, script) as address, trio.fail_after(TIMEOUT):
            command = functions.command(runtime, int(address.split(":")[1]), "func1", "dns:func2.demo", "handoff", 20)
            ended = await trio.run_process(command, capture_stderr=True, check=False)
        assert ended.returncode == 3 if what == "text" else ended.returncode in (1, 3)
        (line,) = ended.stderr.decode().splitlines()
        assert line.isprintable(), (what, line)
        assert "    at " not in line, "a stack trace"


@pytest.mark.parametrize("runtime", OURS)
@pytest.mark.parametrize("me", ["func1", "func2"])
async def test_it_is_told_that_its_own_certificate_was_refused(functions: Functions, runtime: Runtime, me: str) -> None:
    """As TLS client (func1) by its first read; as server before that."""
    site = functions.site
    other = "func2" if me == "func1" else "func1"
    stranger = TestAuthority("another CA").write(site.directory, "another")
    async with site.relay() as relay:
        ended: list[subprocess.CompletedProcess[bytes]] = []

        async def run() -> None:
            ended.append(await functions.run(runtime, relay, me, b"question"))

        with trio.fail_after(TIMEOUT * 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                cert, key = site.paths[other]
                with pytest.raises(frelay.PeerIdentityMismatch):
                    await frelay.client.trio.connect(
                        f"localhost:{relay.port()}",
                        cert=cert,
                        key=key,
                        ca=site.ca_path,
                        inner_ca=stranger,
                        peer=f"dns:{me}.demo",
                    )
        assert ended[0].returncode == 1
        said = ended[0].stderr.decode()
        assert re.search("unknown (ca|certificate authority)|may have refused this function's certificate", said), said


@pytest.mark.parametrize("runtime", OURS)
async def test_the_first_connection_of_a_ticket_may_break(functions: Functions, runtime: Runtime) -> None:
    """After the ticket is sent, the pairing goes on over the second connection."""
    site = functions.site
    ticket = "00" * 32
    heard: list[bytes] = []
    inner = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inner.load_cert_chain(*site.paths["func2"])

    def script(tls: ssl.SSLSocket) -> None:
        read_frame(tls)
        paired = {"pairing": "1", "route": "demo", "peer": "dns:func2.demo", "role": "client", "mode": "ticket"}
        tls.sendall(frame("PAIRED", {**paired, "ticket": ticket, "limits": {}}))
        raw, _ = listeners[0].accept()
        raw.settimeout(TIMEOUT)
        line = b""
        while not line.endswith(b"\n"):
            line += raw.recv(1)
        assert line == f"FRELAY/1 {ticket}\n".encode()
        tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        tls.close()
        with raw, inner.wrap_socket(raw, server_side=True) as wire:
            heard.append(wire.recv(100))
            wire.sendall(b"answer")
            wire.unwrap()

    listeners: list[socket.socket] = []
    with fake_relay(site, script, listeners=listeners) as address, trio.fail_after(TIMEOUT):
        command = functions.command(runtime, int(address.split(":")[1]), "func1", "dns:func2.demo", "ticket", 20)
        ended = await trio.run_process(
            command, stdin=b"question", capture_stdout=True, capture_stderr=True, check=False
        )
    assert heard == [b"question"], ended.stderr
    assert ended.stdout == b"answer", ended.stderr


@pytest.mark.load
@pytest.mark.parametrize("runtime", OURS)
async def test_its_own_limit_ends_the_waiting(functions: Functions, runtime: Runtime) -> None:
    async with functions.site.relay() as relay:
        began = time.monotonic()
        with trio.fail_after(TIMEOUT):
            ended = await functions.run(runtime, relay, "func1", wait=1)
        assert ended.returncode == 1
        assert b"waiting" in ended.stderr
        assert 1 <= time.monotonic() - began < 30  # without the function's own limit the relay would end it after 60


@pytest.mark.parametrize("runtime", OURS)
async def test_a_stranger_is_told_by_the_alert(functions: Functions, runtime: Runtime) -> None:
    """TESTPLAN 1: in TLS 1.3 the alert comes after the client's handshake; the function must not take it for an end."""
    site = functions.site
    site.add("stranger", type(site.ca)("other CA").party(dns=["func1.demo"]))
    async with site.relay() as relay:
        with trio.fail_after(TIMEOUT):
            ended = await functions.run(runtime, relay, "stranger")
        assert ended.returncode == 1
        assert b"unknown" in ended.stderr.lower(), ended.stderr


@pytest.mark.parametrize("runtime", OURS)
async def test_pings_are_answered_while_it_waits(functions: Functions, runtime: Runtime) -> None:
    """It keeps its place through several PINGs and is paired after them."""
    limits = "[limits]\nping_interval = 0.1\npong_timeout = 5\n"
    async with functions.site.relay(sections=limits) as relay:
        ended: dict[str, subprocess.CompletedProcess[bytes]] = {}

        async def run(name: str) -> None:
            ended[name] = await functions.run(runtime, relay, name, name.encode())

        with trio.fail_after(TIMEOUT * 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, "func1")
                await relay.log("waiting", party="func1")
                await trio.sleep(1)  # ten PINGs, or two on a machine that is very busy
                nursery.start_soon(run, "func2")
        assert ended["func1"].stdout == b"func2"
        assert ended["func2"].stdout == b"func1"


async def test_what_follows_the_end_of_the_outer_tls_is_not_swallowed_in_node(site: Site) -> None:
    """A relay worse than ours sends raw bytes behind its close_notify, in one segment; the Duplex keeps them.

    The raw bytes are the ClientHello of the other function, so the inner TLS comes up if, and only if, all are there.
    """
    outer_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    outer_context.load_cert_chain(*site.relay_paths)
    outer_context.set_alpn_protocols(["frelay/1"])
    outer_context.num_tickets = 0
    inner_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    inner_context.load_cert_chain(*site.paths["func1"])
    inner_context.load_verify_locations(site.ca_path)
    inner_context.check_hostname = False
    heard = b""

    async def relay(stream: trio.SocketStream) -> None:
        nonlocal heard
        come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
        outer = outer_context.wrap_bio(come, go, server_side=True)
        await _step(stream, come, go, outer.do_handshake)
        await _step(stream, come, go, partial(outer.read, 4096))
        paired = {"pairing": "1", "route": "demo", "peer": "dns:func1.demo", "role": "server", "mode": "handoff"}
        outer.write(frame("PAIRED", {**paired, "limits": {}}))
        with suppress(ssl.SSLWantReadError):
            outer.unwrap()
        raw_come, raw_go = ssl.MemoryBIO(), ssl.MemoryBIO()
        inner = inner_context.wrap_bio(raw_come, raw_go)
        with suppress(ssl.SSLWantReadError):
            inner.do_handshake()
        await stream.send_all(go.read() + raw_go.read())
        await _step(stream, come, go, outer.unwrap)
        raw_come.write(come.read())
        await _step(stream, raw_come, raw_go, inner.do_handshake)
        heard = await _step(stream, raw_come, raw_go, partial(inner.read, 4096))
        await stream.aclose()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    cert, key = site.paths["func2"]
    options = {"relay": f"127.0.0.1:{port}", "cert": cert, "key": key, "ca": site.ca_path, "peer": "dns:func1.demo"}
    command = [tool("node"), str(EXAMPLES / "node/party.mjs")]
    for option, value in options.items():
        command += [f"--{option}", str(value)]
    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.run_process, command, stdin=b"all is here", check=False))
            async with listeners[0] as listener:
                await relay(await listener.accept())
    assert heard == b"all is here"


async def test_a_record_may_come_in_any_pieces_in_node() -> None:
    """However the network splits it. Five bytes of header alone once made Node loop for ever.

    Nothing here waits for time: each piece is there when Node has nothing else to do.
    """
    script = f"""
        import {{ Duplex }} from 'node:stream';
        import {{ OneRecordAtATime }} from '{(EXAMPLES / "node/frelay.mjs").as_uri()}';

        const turns = async () => {{ for (let i = 0; i < 5; i++) await new Promise(setImmediate); }};
        const record = (size) => Buffer.concat([Buffer.from([0x17, 3, 3, 0, size]), Buffer.alloc(size, 'x')]);
        for (const size of [0, 1, 5, 30]) {{
          for (let offset = 1; offset < 2 * (5 + size); offset++) {{
            const socket = new Duplex({{ read() {{}}, write(data, encoding, done) {{ done(); }} }});
            const under = new OneRecordAtATime(socket);
            const came = [];
            under.on('data', (data) => came.push(data.toString('hex')));
            const sent = Buffer.concat([record(size), record(size), Buffer.from('raw')]);
            for (const piece of [sent.subarray(0, offset), sent.subarray(offset)]) {{
              socket.push(piece);
              await turns();
            }}
            const wanted = Array(2).fill(record(size).toString('hex'));
            const rest = under.release().read()?.toString();
            if (came.join() !== wanted.join() || rest !== 'raw') {{
              throw new Error(`size ${{size}}, split at ${{offset}}: ${{came}}, then ${{rest}}`);
            }}
          }}
        }}
    """
    with trio.fail_after(TIMEOUT):
        await trio.run_process([tool("node"), "--input-type=module", "-e", script])


async def _step(stream: trio.SocketStream, come: ssl.MemoryBIO, go: ssl.MemoryBIO, call: Callable[[], T]) -> T:
    """Drive one call of a TLS object over ``stream`` until it has what it wants."""
    while True:
        try:
            result = call()
        except ssl.SSLWantReadError:
            await stream.send_all(go.read())
            data = await stream.receive_some(65536)
            assert data, "the function went away"
            come.write(data)
        else:
            await stream.send_all(go.read())
            return result


def test_the_go_code_is_formatted_and_vetted(tmp_path: Path) -> None:
    for command in (["gofmt", "-l", "."], ["go", "vet", "./..."]):
        found = subprocess.run(
            [tool(command[0]), *command[1:]],
            cwd=EXAMPLES / "go",
            env=go_environment(tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


# --- meeting by key --------------------------------------------------------------------------------------------------

MESH: Final = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = ["dns:rank0.demo", "dns:rank1.demo", "dns:func1.demo"]
func2 = ["dns:rank0.demo", "dns:rank1.demo", "dns:func2.demo"]
"""


@pytest.mark.parametrize(("one", "two"), [("go", "python"), ("python", "go"), ("node", "python"), ("go", "node")])
async def test_they_meet_by_key(functions: Functions, one: Runtime, two: Runtime) -> None:
    """Both certificates fit both parties, and two others wait on the route: one without a key, one with another."""
    site = functions.site
    for name in ("rank0", "rank1"):
        site.add(name, site.ca.party(dns=[f"{name}.demo"]))
    async with site.relay(MESH) as relay:
        for name, fields in (("func1", {}), ("func2", {"meet": "job/2"})):
            other = await site.party(relay, name)
            await other.join(**fields)
            await other.expect("WAITING")
        said: dict[str, subprocess.CompletedProcess[bytes]] = {}

        async def run(runtime: Runtime, name: str, peer: str) -> None:
            by_key = ("job/1", f"dns:{peer}.demo")
            said[name] = await functions.run(
                runtime, relay, name, name.encode(), peer=f"dns:{peer}.demo", by_key=by_key
            )

        with trio.fail_after(TIMEOUT * 3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, one, "rank0", "rank1")
                nursery.start_soon(run, two, "rank1", "rank0")
        assert (said["rank0"].returncode, said["rank0"].stdout) == (0, b"rank1"), said["rank0"].stderr
        assert (said["rank1"].returncode, said["rank1"].stdout) == (0, b"rank0"), said["rank1"].stderr
        assert (await relay.outcome())["meet"] == "job/1"
        assert relay.waiting() == (1, 1)


@pytest.mark.parametrize("echo", [{}, {"meet": "another"}, {"meet": "job"}], ids=["none", "another", "no list"])
@pytest.mark.parametrize("answer", ["WAITING", "PAIRED"])
@pytest.mark.parametrize("runtime", OURS)
async def test_a_relay_that_does_not_know_keys_is_left(
    functions: Functions, runtime: Runtime, answer: str, echo: dict[str, str]
) -> None:
    def script(tls: ssl.SSLSocket) -> None:
        _, join = read_frame(tls)
        assert (join["meet"], join["partner"]) == ("job", ["dns:func2.demo"])
        if answer == "WAITING":
            said = {"route": "r", "party": "func1", "identity": "dns:func1.demo", "deadline": 60, "peer_seen": None}
        else:
            said = {"pairing": "1", "route": "r", "peer": "dns:func2.demo", "role": "client", "mode": "handoff"}
        tls.sendall(frame(answer, {**said, **echo}))
        while tls.recv(100):
            pass

    with fake_relay(functions.site, script) as address, trio.fail_after(TIMEOUT):
        port, by_key = int(address.split(":")[1]), ("job", "dns:func2.demo")
        command = functions.command(runtime, port, "func1", "dns:func2.demo", "handoff", 20, *by_key)
        ended = await trio.run_process(command, capture_stderr=True, check=False)
    assert ended.returncode == 1
    assert b"update the relay" in ended.stderr
