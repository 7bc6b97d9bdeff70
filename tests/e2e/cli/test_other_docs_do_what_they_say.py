"""The blocks of all other pages are run as they are, or this file says why not.

The three that a newcomer and an operator follow are in ``test_docs_do_what_they_say.py``.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.blocks import PAGES, ROOT, Machine, blocks, find, machine
from support.tools import tool

RUN: Final = {
    "examples/go/README.md": ("wire, err := frelay.Connect", "go build -o frelay-party"),
    "examples/node/README.md": ("import { connect, Refused }", "node party.mjs"),
    "examples/socat-stunnel-openssl/README.md": ("./socat.sh",),
    "examples/asgi/README.md": ("python serve.py app:app", "curl --silent"),
    "examples/httpx/README.md": ("transport = FrelayTransport(",),
    "examples/grpc/README.md": ("python server.py words.sock &", "python client.py unix:here.sock"),
    "docs/metrics.md": ("[metrics]", "scrape_configs:"),
    "docs/groups.md": (
        '[[route]]\nname = "job42"',
        "frelay ca party rank$r",
        "group.allreduce(vector)",
        "python add.py monday",
        "frelay.client.trio.group(",
    ),
}
NOT_RUN: Final[dict[str, dict[str, str]]] = {
    "examples/lambda/README.md": {"zip -qr": "it fetches hatchling; test_example_lambda.py runs the handler"},
    "examples/shuffle/README.md": {"start.py --workers 4": "test_example_shuffle.py runs it, with other numbers"},
    "docs/capacity.md": {"bench/model.py": "it takes minutes; .ci/run has the quick form of it"},
    "docs/install.md": {
        ".ci/release.py dist": "it fetches packages; .ci/run runs it",
        "/opt/frelay/bin/pip install": "it fetches packages; test_client_alone_is_enough.py installs the wheels",
        "podman build": "it fetches packages; .ci/image builds the image",
        "podman run -d": "it needs the image; .ci/image has tests/e2e/image/test_image_runs.py run it",
    },
    "docs/mutation.md": {".ci/mutants": "it takes hours"},
    "CONTRIBUTING.md": {"pip install -e '.[dev]'": "it fetches packages, and is these tests and .ci/run"},
}


def pages() -> list[str]:
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")]
    return sorted({str(path.relative_to(ROOT)) for path in found} - set(PAGES))


@pytest.mark.parametrize("page", pages())
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    """A block without a language is a picture or an output."""
    known = [*RUN.get(page, ()), *NOT_RUN.get(page, ())]
    for block in blocks(page):
        matches = sum(text in block.text for text in known)
        assert matches == (1 if block.language else 0), f"{page}: what about this block?\n{block.text}"
    for text in known:
        assert text in find(page, text).text


# --- docs/metrics.md --------------------------------------------------------------------------------------------------


def test_metrics(tmp_path: Path) -> None:
    section, scrape = (find("docs/metrics.md", text).text for text in RUN["docs/metrics.md"])
    with machine(tmp_path) as here:
        assert here.run("frelay init .").code == 0
        config = tmp_path / "relay.toml"
        config.write_text(section + config.read_text())
        said = here.run("frelay check -c relay.toml")
        assert said.code == 0, said.stderr
        shutil.copy(ROOT / "deploy/prometheus-alerts.yml", tmp_path)
        (tmp_path / "prometheus.yml").write_text(scrape)
        said = here.run(f"{tool('promtool')} check config prometheus.yml")
        assert said.code == 0, said.stdout + said.stderr


# --- docs/groups.md ---------------------------------------------------------------------------------------------------


def test_groups(tmp_path: Path) -> None:
    route, certificates, program, start, trio_program = (find("docs/groups.md", one) for one in RUN["docs/groups.md"])
    with machine(tmp_path) as here:
        assert here.run("frelay init .").code == 0
        config = tmp_path / "relay.toml"
        config.write_text(config.read_text() + route.text)
        made = here.run(certificates.text)
        assert made.code == 0, made.stderr
        (tmp_path / "add.py").write_text(program.text)
        (tmp_path / "spread.py").write_text(trio_program.text)
        with here.start("frelay run -c relay.toml") as relay:
            relay.says("ready")
            (command,) = start.commands
            said = here.run(command.text)
            assert sorted(said.stdout.splitlines()) == command.output.splitlines(), said.stderr
            said = here.run(command.text.replace("add.py", "spread.py"))
            everything = [f"from {rank}".encode() for rank in range(3)]
            assert sorted(said.stdout.splitlines()) == [f"{rank} got {everything}" for rank in range(3)], said.stderr


# --- examples ---------------------------------------------------------------------------------------------------------

ANSWER: Final = """
import frelay
with frelay.connect(
    "relay.example:9001", cert="func2.pem", key="func2.key", ca="ca.pem", peer="dns:func1.demo", wait=60
) as wire:
    question = wire.makefile("rb").read()
    wire.sendall(b"answer to " + question)
    wire.send_eof()
"""


@contextmanager
def beside_a_relay(directory: Path, example: str) -> Iterator[Machine]:
    """A copy of an example, with certificates in ``certs`` and beside it, and a relay that it may dial."""
    shutil.copytree(ROOT / "examples" / example, directory / "example")
    with machine(directory, "relay.example") as here:
        (directory / "example/.venv").symlink_to(directory / ".venv")
        made = here.run(
            "cd example && frelay init . && frelay ca relay relay --dns relay.example --dns localhost --ip 127.0.0.1 "
            "--force && cp -p certs/func?.* certs/ca.pem ."
        )
        assert made.code == 0, made.stderr
        with here.start("cd example && exec frelay run -c relay.toml") as relay:
            relay.says("ready")
            yield here


def a_command(here: Machine, script: str) -> None:
    """One end runs ``script`` as it is, the other end runs what it says for func2."""
    two = script.replace("func1", "FUNC").replace("func2", "func1").replace("FUNC", "func2")
    with here.start(f"cd example; {two}") as other:
        other.write("from func2\n", is_last=True)
        said = here.run(f"cd example; {script}", stdin="from func1\n")
        assert other.end() == 0, other.output
    assert (said.code, said.stdout) == (0, "from func2\n"), said.stderr
    assert "from func1\n" in other.output


def test_go(tmp_path: Path) -> None:
    go = tool("go")
    sample, command = (find("examples/go/README.md", text).text for text in RUN["examples/go/README.md"])
    with beside_a_relay(tmp_path, "go") as here:
        environment = {"GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "HOME": str(tmp_path)}
        module = (tmp_path / "example/go.mod").read_text().split()[1]
        (tmp_path / "example/sample").mkdir()
        # Only the handling of a refusal is left to the reader.
        body = textwrap.indent(sample.replace("\t...\n", "\t_ = errors.As(err, &refused)\n"), "\t")
        (tmp_path / "example/sample/sample.go").write_text(
            'package sample\n\nimport (\n\t"context"\n\t"crypto/tls"\n\t"crypto/x509"\n\t"errors"\n\t"time"\n\n'
            f'\t"{module}/frelay"\n)\n\n'
            f"func sample(ctx context.Context, certificate tls.Certificate, pool *x509.CertPool) {{\n{body}}}\n"
        )
        vetted = here.run(f"cd example && {go} vet ./sample", env=environment)
        assert vetted.code == 0, vetted.stderr
        build, _, join = command.partition(" && ")
        built = here.run(f"cd example && {build}", env=environment)
        assert built.code == 0, built.stderr
        a_command(here, join)


def test_node(tmp_path: Path) -> None:
    tool("node")
    sample, command = (find("examples/node/README.md", text).text for text in RUN["examples/node/README.md"])
    with beside_a_relay(tmp_path, "node") as here:
        a_command(here, command)
        (tmp_path / "example/sample.mjs").write_text(sample)
        (tmp_path / "example/answer.py").write_text(ANSWER)
        with here.start("cd example; python answer.py") as other:
            said = here.run("cd example; node sample.mjs")
            assert other.end() == 0, other.output
        assert (said.code, said.stdout) == (0, "answer to hello from func1"), said.stderr


def test_shell(tmp_path: Path) -> None:
    tool("socat")
    command = find("examples/socat-stunnel-openssl/README.md", "./socat.sh").text
    with beside_a_relay(tmp_path, "socat-stunnel-openssl") as here:
        with here.start("cd example; " + command.replace("func1", "func2")) as other:
            said = here.run(f"cd example; {command}")
            other.says("hello from func1")
        assert (said.code, said.stdout) == (0, "hello from func2\n"), said.stderr


def test_asgi_and_httpx(tmp_path: Path) -> None:
    """One app, and both pages' callers."""
    serve, curl = (find("examples/asgi/README.md", text).text for text in RUN["examples/asgi/README.md"])
    (sample,) = (find("examples/httpx/README.md", text).text for text in RUN["examples/httpx/README.md"])
    with beside_a_relay(tmp_path, "asgi") as here:
        shutil.copy(ROOT / "examples/httpx/frelay_httpx.py", tmp_path / "example")
        (tmp_path / "example/sample.py").write_text(sample)
        with here.start(f"cd example; {serve}"):
            said = here.run("cd example; python sample.py")
            assert (said.code, said.stdout) == (0, "GET /things/7: \n"), said.stderr
            said = here.run(f"cd example; {curl}\nkill $!")
            assert (said.code, said.stdout) == (0, "GET /hello: "), said.stderr


def test_grpc(tmp_path: Path) -> None:
    serve, call = (find("examples/grpc/README.md", text).text for text in RUN["examples/grpc/README.md"])
    with beside_a_relay(tmp_path, "grpc") as here, here.start(f"cd example; {serve}"):
        said = here.run(f"cd example; {call}\nkill $!")
        assert (said.code, said.stdout) == (0, "HELLO\n0 1 2 3 4\none two\n"), said.stderr
