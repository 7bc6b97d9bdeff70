"""Every block of README.md, docs/functions.md and docs/operating.md is run as it stands, or says here why it is not.

The pages are followed as a reader follows them, from top to bottom, on a machine with a network of its own
(``tests/support/blocks.py``). A block that is new, or that has become another one, is in none of the lists, and fails.
"""

from __future__ import annotations

import re
import shutil
import textwrap
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.blocks import PAGES, Block, Machine, Running, blocks, find, machine
from support.tools import tool

RUN: Final[dict[str, tuple[str, ...]]] = {
    "README.md": (
        "frelay init my-relay\n",
        '[[route]]\nname = "demo"',
        "me, other = sys.argv[1:]",
        "python func.py func1 func2 &",
        "[info ] pairing ended",
        "$ openssl s_client",
        "$ frelay route add shuffle",
        "rank, size = int(sys.argv[1]), 4",
        "$ frelay route add job",
        "while tls.recv(4096):",
    ),
    "docs/functions.md": (
        'wire.sendall(b"question")',
        'rank3 = frelay.connect(address, meet="job42/3-7"',
        "await frelay.client.trio.connect(address",
        "frelay connect relay.acme:9001 --cert func1.pem",
        "frelay connect relay.acme:9001 --to 127.0.0.1:6379",
        "for wire in listener:",
        "await trio.serve_listeners(handler, [listener])",
    ),
    "docs/operating.md": (
        "frelay ca init ca ",
        '[relay]\nname = "relay-1"',
        "frelay run -c relay.toml",
        "frelay ca init new-ca",
        "cp both-crl.pem certs/crl.pem",
        "frelay ca relay relay --ca new-ca",
        "cp new-relay-certs/relay.key",
        "cp new-ca/ca.pem certs/ca.pem",
        "[warning] refused",
    ),
}
"""What is run below, by page: some text of each block that no other one has."""

NOT_RUN: Final[dict[str, dict[str, str]]] = {
    "README.md": {
        "func1                         frelay": "a picture",
        "frelay demo\n": "it fetches packages; .ci/run runs it as it stands, in a clone",
        "pytest -q -n 2": "these very tests; .ci/run runs it as it stands, in a clone",
        "A relay and two functions on this machine": "what the demo prints: test_cli_demo.py",
        "$ ssh -N -L 8080": "it goes to another machine; test_dashboard.py asks a forwarded socket for the page",
    },
    "docs/functions.md": {
        "pip install --no-deps .": "it fetches hatchling; test_client_alone_is_enough.py has what it installs",
    },
    "docs/operating.md": {
        "frelay.service /etc/systemd/system/\n": "it changes this machine's services; test_deploy.py judges the units",
        "frelay.service.d/notify.conf\n": "it changes this machine's services; test_deploy.py judges the drop-in",
    },
}
"""What is not run, by page, and why."""


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    known = [*RUN[page], *NOT_RUN[page]]
    for block in blocks(page):
        assert sum(text in block.text for text in known) == 1, f"{page}: what about this block?\n{block.text}"
    for text in known:
        assert text in find(page, text).text


# --- what a reader has beside the page --------------------------------------------------------------------------------


@contextmanager
def relay(here: Machine, command: str) -> Iterator[Running]:
    """A running ``frelay run``, called as the page writes it."""
    with here.start(command) as running:
        running.says("ready")
        yield running


def succeeds(here: Machine, script: str, *, stdin: str = "") -> str:
    """The output of a script, which must succeed."""
    said = here.run(script, stdin=stdin)
    assert said.code == 0, f"{script}\n{said.stdout}{said.stderr}"
    return said.stdout


def without_dates(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "DATE", text)


def rows(text: str) -> list[str]:
    """The lines of a table, without the widths of its columns and the numbers of bytes."""
    return [re.sub(r"\S+ [kMG]?B ", "BYTES ", " ".join(line.split())) for line in text.splitlines()]


# --- README -----------------------------------------------------------------------------------------------------------


def test_readme(tmp_path: Path) -> None:
    """Five minutes: a relay of your own, two functions, any TLS client, and a change while it runs."""
    page = "README.md"
    init, check, run = find(page, RUN[page][0]).commands
    with machine(tmp_path) as here:
        assert succeeds(here, init.text) == init.output
        assert without_dates(succeeds(here, check.text)) == without_dates(check.output)
        config = tmp_path / "my-relay/relay.toml"
        written = tomllib.loads(config.read_text())
        assert tomllib.loads(find(page, RUN[page][1]).text)["route"] == written["route"]
        with relay(here, run.text) as running:
            two_functions(here, page, running)
            config.write_text(config.read_text() + "require_inner_tls = false\n")
            running.says("reloaded")
            any_tls_client(here, page)
            leaves_tls(here, page)
            running.says("pairing ended", count=3)
            change_while_it_runs(here, page, tmp_path)
            talk_all_to_all(here, page)


def two_functions(here: Machine, page: str, running: Running) -> None:
    (here.directory / "my-relay/func.py").write_text(find(page, RUN[page][2]).text)
    enter, both = find(page, RUN[page][3]).commands
    # An interactive shell stays at its prompt; this one must wait for its background processes.
    printed = succeeds(here, f"{enter.text}\n{both.text}\nwait")
    assert sorted(printed.splitlines()) == sorted(both.output.splitlines())
    keys = re.findall(r"(\w+)=", find(page, RUN[page][4]).text)
    assert re.findall(r"(\w+)=", running.says("pairing ended")) == keys


def any_tls_client(here: Machine, page: str) -> None:
    (client,) = find(page, RUN[page][5]).commands
    one, two = f"cd my-relay; {client.text}", f"cd my-relay; {client.text}".replace("func1", "func2")
    with here.start(one) as first, here.start(two) as second:
        first.write("from func1\n")
        second.says("from func1")
        second.write("from func2\n")
        first.says("from func2")


def leaves_tls(here: Machine, page: str) -> None:
    """The two calls with which Python leaves TLS, in a function that uses only ``ssl`` and the protocol's frames."""
    function = f"""
import json, socket, ssl, struct, sys, uuid
me, word = sys.argv[1:]
context = ssl.create_default_context(cafile="certs/ca.pem")
context.load_cert_chain(f"certs/{{me}}.pem", f"certs/{{me}}.key")
context.set_alpn_protocols(["frelay/1"])
tls = context.wrap_socket(socket.create_connection(("127.0.0.1", 9001)), server_hostname="localhost")
body = json.dumps({{"attempt": str(uuid.uuid4())}}).encode()
tls.sendall(struct.pack(">BBH", 1, 0, len(body)) + body)
def exactly(count):
    data = b""
    while len(data) < count:
        data += tls.recv(count - len(data)) or sys.exit("the relay ended")
    return data
kind = None
while kind != 0x13:
    kind, _, length = struct.unpack(">BBH", exactly(4))
    exactly(length)
{find(page, RUN[page][9]).text}
raw.sendall(word.encode())
raw.shutdown(socket.SHUT_WR)
print(me, "received", raw.makefile("rb").read().decode())
"""
    (here.directory / "my-relay/bare.py").write_text(function)
    printed = succeeds(here, "cd my-relay; python bare.py func1 ping & python bare.py func2 pong; wait")
    assert sorted(printed.splitlines()) == ["func1 received pong", "func2 received ping"]


def change_while_it_runs(here: Machine, page: str, directory: Path) -> None:
    add, routes, plan, why, top = find(page, RUN[page][6]).commands
    for command in (add, routes):
        printed = succeeds(here, command.text).replace(str(directory), "/srv")
        assert rows(printed) == rows(command.output)
    config = directory / "my-relay/relay.toml"
    shutil.copy(config, directory / "my-relay/new.toml")
    with open(directory / "my-relay/new.toml", "a") as file:
        file.write('[[route]]\nname = "third"\nlisten = "127.0.0.1:9003"\nfunc1 = "dns:a"\nfunc2 = "dns:b"\n')
    assert "add      third, on 127.0.0.1:9003" in succeeds(here, plan.text)
    succeeds(here, "frelay ca init another && frelay ca party stranger --ca another --dns func1.demo --out .")
    said = here.run(why.text)
    assert said.code == 1
    assert "not-authorised" in said.stdout + said.stderr
    assert "shuffle" in succeeds(here, top.text)


def talk_all_to_all(here: Machine, page: str) -> None:
    (here.directory / "my-relay/ranks.py").write_text(find(page, RUN[page][7]).text)
    add, *rest = find(page, RUN[page][8]).commands
    assert "listens on 127.0.0.1:9003" in succeeds(here, add.text)
    printed = succeeds(here, "\n".join(command.text for command in rest))
    # Before it, `frelay ca party` says what it has written.
    assert sorted(line for line in printed.splitlines() if " has " in line) == rest[-1].output.splitlines()


# --- docs/functions.md ------------------------------------------------------------------------------------------------

FUNCTIONS_RELAY: Final = """
[tls]
certificate = "relay.pem"
private_key = "relay.key"
client_ca = "ca.pem"
[admin]
[[route]]
name = "demo"
listen = "127.0.0.1:9001"
func1 = ["dns:func1.acme", "dns:*.job42"]
func2 = ["dns:func2.acme", "dns:*.job42"]
"""

ANSWER: Final = """
import frelay
with frelay.connect(
    "relay.acme:9001", cert="func2.pem", key="func2.key", ca="ca.pem", peer="dns:func1.acme", wait=60
) as wire:
    question = wire.makefile("rb").read()
    wire.sendall(b"answer to " + question)
    wire.send_eof()
"""


def test_functions(tmp_path: Path) -> None:
    """Each client of the page, against one relay."""
    page = "docs/functions.md"
    with machine(tmp_path, "relay.acme") as here:
        succeeds(here, "frelay ca init . && frelay ca relay relay --dns relay.acme")
        succeeds(here, "for one in func1 func2; do frelay ca party $one --dns $one.acme; done")
        succeeds(here, "for one in rank3 rank7; do frelay ca party $one --dns $one.job42; done")
        (tmp_path / "relay.toml").write_text(FUNCTIONS_RELAY)
        (tmp_path / "answer.py").write_text(ANSWER)
        with relay(here, "frelay run -c relay.toml") as running:
            blocking_client(here, page)
            meeting_by_name(here, page)
            for program in programs_of_both_clients(find(page, RUN[page][2])):
                with_an_answer(here, program)
            a_function_that_serves_many(here, page)
            the_command(here, page)
            a_service(here, page, running)


def with_an_answer(here: Machine, program: str) -> None:
    (here.directory / "sample.py").write_text(program)
    with here.start("python answer.py") as answers:
        assert succeeds(here, "python sample.py") == "answer to question\n"
        assert answers.end() == 0, answers.output


def blocking_client(here: Machine, page: str) -> None:
    with_an_answer(here, find(page, RUN[page][0]).text + "\nprint(answer.decode())\n")


def meeting_by_name(here: Machine, page: str) -> None:
    """As rank 3 and rank 7, whose certificates fit both parties of the route: neither says which one it is."""
    call = find(page, RUN[page][1]).text.replace("rank3 = ", "with ").rstrip()
    head = """
import frelay
address = "relay.acme:9001"
options = dict(cert="rank3.pem", key="rank3.key", ca="ca.pem", wait=60)
"""
    body = " as wire:\n    wire.sendall(b'from 3')\n    print(wire.recv(100).decode())\n"
    rank3 = head + call + body
    swapped = rank3.replace("3-7", "KEY").replace("rank3", "RANK").replace("rank7", "rank3").replace("RANK", "rank7")
    (here.directory / "rank3.py").write_text(rank3)
    (here.directory / "rank7.py").write_text(swapped.replace("KEY", "3-7").replace("from 3", "from 7"))
    printed = succeeds(here, "python rank3.py & python rank7.py; wait")
    assert sorted(printed.splitlines()) == ["from 3", "from 7"]


def programs_of_both_clients(block: Block) -> list[str]:
    """The Trio and the asyncio lines as programs: only what the page leaves out is added."""
    for_trio, for_asyncio = block.text.split("\n\n")
    head = """
address = "relay.acme:9001"
options = dict(cert="func1.pem", key="func1.key", ca="ca.pem", peer="dns:func2.acme", wait=60)
async def main():
"""
    trio_body = """
        await stream.send_all(b"question")
        await stream.send_eof()
        print(b"".join([part async for part in stream]).decode())
"""
    asyncio_body = """
    writer.write(b"question")
    writer.write_eof()
    print((await reader.read()).decode())
    writer.close()
"""
    assert for_trio.rstrip().endswith("as stream: ...")
    for_trio = for_trio.rstrip().removesuffix(" ...") + textwrap.indent(textwrap.dedent(trio_body), "    ")
    return [
        f"import frelay, trio\n{head}{textwrap.indent(for_trio, '    ')}\ntrio.run(main)\n",
        f"import asyncio, frelay\n{head}{textwrap.indent(for_asyncio, '    ')}{asyncio_body}\nasyncio.run(main())\n",
    ]


def a_function_that_serves_many(here: Machine, page: str) -> None:
    """Three listeners, one after the other, each with three calls by the page's own caller."""
    for_trio, for_asyncio = find(page, RUN[page][6]).text.split("\n\n")
    head = """
address = "relay.acme:9001"
options = dict(cert="func2.pem", key="func2.key", ca="ca.pem", peer="dns:func1.acme")
async def handler(stream):
    await stream.send_all(b"answer to " + b"".join([part async for part in stream]))
    await stream.aclose()
async def callback(reader, writer):
    writer.write(b"answer to " + await reader.read())
    writer.close()
async def main():
"""
    programs = (
        f"import frelay\n{find(page, RUN[page][5]).text}",
        f"import frelay, trio\n{head}{textwrap.indent(for_trio, '    ')}\ntrio.run(main)\n",
        f"import asyncio, frelay\n{head}{textwrap.indent(for_asyncio, '    ')}\nasyncio.run(main())\n",
    )
    (here.directory / "sample.py").write_text(find(page, RUN[page][0]).text + "\nprint(answer.decode())\n")
    for program in programs:
        (here.directory / "listen.py").write_text(program)
        with here.start("exec python listen.py") as listens:
            for _ in range(3):
                assert succeeds(here, "python sample.py") == "answer to question\n"
            assert listens.output == ""


def the_command(here: Machine, page: str) -> None:
    one = find(page, RUN[page][3]).text
    two = one.replace("func1", "FUNC").replace("func2", "func1").replace("FUNC", "func2")
    with here.start(two) as other:
        other.write("from func2\n", is_last=True)
        assert succeeds(here, one, stdin="from func1\n") == "from func2\n"
        other.says("from func1")


def a_service(here: Machine, page: str, running: Running) -> None:
    """redis, where the page says ``...`` with the options in the environment; and another local port, as it is one
    machine here. What the page has for ssh is run by test_connect_real_programs.py, with a server.
    """
    lines = find(page, RUN[page][4]).text.splitlines()
    serve, use = (re.sub(r"\.\.\. +#.*", "", line) for line in lines[:2])
    assert lines[3].startswith("ssh -o ProxyCommand='frelay connect ")
    options = {"FRELAY_CA": "ca.pem"}
    func1 = {**options, "FRELAY_CERT": "func1.pem", "FRELAY_KEY": "func1.key", "FRELAY_PEER": "dns:func2.acme"}
    func2 = {**options, "FRELAY_CERT": "func2.pem", "FRELAY_KEY": "func2.key", "FRELAY_PEER": "dns:func1.acme"}
    redis = f"exec {tool('redis-server')} --bind 127.0.0.1 --port 6379 --save ''"
    with (
        here.start(redis) as server,
        here.start(f"exec {serve}", env=func2),
        here.start(f"exec {use} --json".replace("127.0.0.1:6379", "127.0.0.1:6380"), env=func1) as port,
    ):
        server.says("Ready to accept connections")
        port.says("listening")
        asked = f"{tool('redis-cli')} -p 6380 set greeting hello && {tool('redis-cli')} -p 6380 get greeting"
        assert succeeds(here, asked) == "OK\nhello\n"


# --- docs/operating.md ------------------------------------------------------------------------------------------------

TALK: Final = """
import sys
import frelay
me, address, cert, key, ca, peer = sys.argv[1:]
with frelay.connect(address, cert=cert, key=key, ca=ca, peer=peer, wait=60, retry=True) as wire:
    print("paired", flush=True)
    for line in sys.stdin:
        wire.sendall(line.encode())
        print("received", wire.recv(100).decode().strip(), flush=True)
"""


def talker(me: str, certs: str, ca: str) -> str:
    """The command of one function."""
    peer = {"func1": "uri:spiffe://acme/jobs/func2", "func2": "dns:func1.acme"}[me]
    pair = f"{certs.format(me)}/{me}.pem {certs.format(me)}/{me}.key"
    return f"exec python talk.py {me} relay.acme.example:9001 {pair} {ca} {peer}"


@contextmanager
def talking(here: Machine, certs: str, ca: str) -> Iterator[tuple[Running, Running]]:
    """A pairing of func1 and func2, with certificates from ``certs``1 and 2, that goes on until this is left."""
    (here.directory / "talk.py").write_text(TALK)
    with here.start(talker("func1", certs, ca)) as one, here.start(talker("func2", certs, ca)) as two:
        for function in (one, two):
            function.says("paired")
        yield one, two


def talk(ends: tuple[Running, Running], word: str) -> None:
    """A message of each arrives at the other."""
    one, two = ends
    one.write(f"{word}1\n")
    two.write(f"{word}2\n")
    one.says(f"received {word}2")
    two.says(f"received {word}1")


def test_operating(tmp_path: Path) -> None:
    """From nothing to two functions; then the authority is replaced while they run."""
    page = "docs/operating.md"
    text = dict(zip(("ca", "toml", "run", "both", "trust", "issue", "relay", "new"), RUN[page], strict=False))
    script = {name: find(page, known).text for name, known in text.items()}
    with machine(tmp_path, "relay.acme.example") as here:
        succeeds(here, script["ca"])
        succeeds(here, "mkdir certs && cp -p relay-certs/* ca/ca.pem ca/crl.pem certs/")
        (tmp_path / "relay.toml").write_text(script["toml"])
        check, run = script["run"].splitlines()
        succeeds(here, check)
        with relay(here, run) as running:
            with talking(here, "{}-certs", "ca/ca.pem") as old:
                talk(old, "before")
                look(here, page, running)

                succeeds(here, script["both"])
                succeeds(here, script["trust"])
                talk(old, "both")

                succeeds(here, script["issue"])
                succeeds(here, script["relay"])
                talk(old, "issued")
                # A function with an old certificate is still let in, if it trusts both authorities.
                with talking(here, "{}-certs", "both-ca.pem") as late:
                    talk(late, "late")
            with talking(here, "new-{}-certs", "both-ca.pem") as new:
                talk(new, "new")
                succeeds(here, script["new"])
                talk(new, "alone")
                with talking(here, "new-{}-certs", "new-ca/ca.pem") as last:
                    talk(last, "last")
                    assert "issuer CN=acme functions 2;" in running.output
                refusals = running.output.count("code=not-authorised")
                assert here.run(talker("func1", "{}-certs", "new-ca/ca.pem")).code == 1
                running.says("code=not-authorised", count=refusals + 1)
                talk(new, "still")


def look(here: Machine, page: str, running: Running) -> None:
    """``frelay status`` and ``frelay top``, which the text names; and the line of a refusal, key by key."""
    assert "relay-1" in succeeds(here, "frelay status")
    assert "shuffle" in succeeds(here, "frelay top")
    succeeds(here, "frelay ca party stranger --ca ca --dns func1.acme.internal --out .")
    address, pair = "relay.acme.example:9001", "--cert stranger.pem --key stranger.key --ca ca/ca.pem"
    said = here.run(f"frelay connect {address} {pair} --peer dns:func2.acme")
    assert said.code == 3
    keys = re.findall(r"(\w+)=", find(page, RUN[page][8]).text.replace("CN=", ""))
    assert re.findall(r"(\w+)=", running.says("refused").replace("CN=", "")) == keys
