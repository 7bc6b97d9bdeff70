"""The client of the admin API: which relay it finds, and its messages when that does not answer properly."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from frelay.cli.admin_client import (
    AdminClient,
    CallFailed,
    Credentials,
    UsageError,
    find_admin_address,
    parse_admin_address,
    route_path,
)
from frelay.errors import CertificateError

FILE = '[admin]\nlisten = "unix:run/a.sock"\n'


@contextmanager
def answering(path: Path, answer: bytes | None) -> Iterator[None]:
    """A server on a Unix socket that answers one request with these bytes, or never if they are None."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen()
        done = threading.Event()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                if answer is None:
                    done.wait()
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def failure(call: Callable[[], object]) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        call()
    return caught.value


def at(path: Path, *, timeout: float | None = None) -> AdminClient:
    return AdminClient(parse_admin_address(f"unix:{path}", "--admin"), timeout=timeout)


# --- where it is ------------------------------------------------------------------------------------------------------


def test_what_was_typed_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "relay.toml").write_text(FILE)
    (tmp_path / "other.toml").write_text('[admin]\nlisten = "127.0.0.1:9443"\n')
    monkeypatch.chdir(tmp_path)
    environ = {"FRELAY_ADMIN": "unix:/env.sock", "FRELAY_CONFIG": "other.toml"}
    assert str(find_admin_address("unix:/typed.sock", Path("other.toml"), environ)) == "unix:/typed.sock"
    assert str(find_admin_address(None, Path("relay.toml"), environ)) == f"unix:{tmp_path}/run/a.sock"
    assert str(find_admin_address(None, None, environ)) == "unix:/env.sock"
    assert str(find_admin_address(None, None, {"FRELAY_CONFIG": "other.toml"})) == "127.0.0.1:9443"
    assert str(find_admin_address(None, None, {})) == f"unix:{tmp_path}/run/a.sock"


def test_a_path_starts_from_the_directory_of_what_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "relay.toml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    assert find_admin_address(None, Path("etc/relay.toml"), {}).where == tmp_path / "etc/run/a.sock"
    assert find_admin_address("unix:run/a.sock", None, {}).where == tmp_path / "run/a.sock"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("127.0.0.1:9443", "127.0.0.1:9443"),
        ("https://relay.acme:9443", "relay.acme:9443"),
        ("https://relay.acme:9443/", "relay.acme:9443"),
        ("[::1]:9443", "[::1]:9443"),
    ],
)
def test_an_address_may_be_a_url(text: str, place: str) -> None:
    assert str(parse_admin_address(text, "--admin")) == place


@pytest.mark.parametrize(
    "text", ["http://localhost:1", "https://a:1/v1", "relay.acme", "unix:", "unix:" + "x" * 108, "a:99999", "unix:a\0b"]
)
def test_what_is_no_place_is_a_wrong_call(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--admin: "):
        parse_admin_address(text, "--admin")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "there is no route file "),
        ("[admin", "is not valid TOML"),
        ("\ud800".encode("utf-8", "surrogatepass"), "is not valid TOML"),
        ('admin = "x"', "admin.listen is not text"),
        ("[admin]\nlisten = 9", "admin.listen is not text"),
        ('[admin]\nlisten = "here"', "'here' is not an address"),
    ],
)
def test_a_file_that_leads_nowhere(tmp_path: Path, content: str | bytes | None, text: str) -> None:
    path = tmp_path / "relay.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = failure(lambda: find_admin_address(None, path, {}))
    assert text in error.message
    assert str(path) in error.message


def test_a_file_without_an_admin_section_says_what_to_add(tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"
    path.write_text("[relay]\n")
    error = failure(lambda: find_admin_address(None, path, {}))
    assert "has no [admin] section" in error.message
    assert error.details == ("[admin]", 'listen = "unix:frelay.sock"')
    path.write_text("\n".join(("[relay]", *error.details)))
    assert find_admin_address(None, path, {}).where == tmp_path / "frelay.sock"


def test_a_file_that_is_wrong_elsewhere_still_leads_to_its_relay(tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"
    path.write_text("[relay]\nnam = 3\n[admin]\n")
    assert find_admin_address(None, path, {}).where == tmp_path / "frelay.sock"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_a_name_that_no_path_can_hold_is_a_wrong_call(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a route"):
        route_path(name)
    assert route_path("a b") == "/v1/routes/a%20b"


# --- no relay ---------------------------------------------------------------------------------------------------------


def test_no_socket(tmp_path: Path) -> None:
    error = failure(lambda: at(tmp_path / "a.sock").get("/v1/status"))
    assert error.message.startswith("no relay is running here, or it listens elsewhere: there is no socket ")
    assert error.message.endswith(f"{tmp_path}/a.sock (from --admin)")


def test_a_socket_that_was_left_behind(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "a.sock"))
    error = failure(lambda: at(tmp_path / "a.sock").get("/v1/status"))
    assert error.message.startswith("no relay is running here: nobody listens at ")


@contextmanager
def as_somebody_else(path: Path) -> Iterator[None]:
    """As a user who may not use the socket: root becomes nobody, another user removes the mode."""
    if os.geteuid() != 0:
        path.chmod(0)
        yield
        return
    path.chmod(0o600)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_socket_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        client = at(path)
        with as_somebody_else(path):
            error = failure(lambda: client.get("/v1/status"))
    assert error.message.startswith(f"permission denied on {path}: the socket is for its owner alone (mode 0600)")
    assert error.message.endswith("run this as its owner")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (Credentials(), "--cert and --ca missing"),
        (Credentials(cert=Path("a")), "--ca missing"),
        (Credentials(ca=Path("a")), "--cert missing"),
    ],
)
def test_an_address_needs_certificates(given: Credentials, missing: str) -> None:
    with pytest.raises(UsageError, match=missing):
        AdminClient(parse_admin_address("127.0.0.1:1", "--admin"), given)


@pytest.mark.parametrize("given", [Credentials(), Credentials(server_name="relay.demo.")])
def test_a_name_with_a_dot_at_its_end_is_looked_for_without(
    given: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dot is for the resolver; no certificate has it."""
    monkeypatch.setattr("frelay.cli.admin_client._context", lambda *_: None)
    with AdminClient(parse_admin_address("relay.demo.:1", "--admin"), given) as client:
        assert client._name == "relay.demo"
        assert str(client.address.where) == "relay.demo.:1"


def test_certificates_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="ca: there is no file"):
        AdminClient(parse_admin_address("127.0.0.1:1", "--admin"), Credentials(cert=tmp_path / "c", ca=tmp_path / "ca"))


# --- invalid answers --------------------------------------------------------------------------------------------------


def test_no_answer_in_time(tmp_path: Path) -> None:
    with answering(tmp_path / "a.sock", None):
        error = failure(lambda: at(tmp_path / "a.sock", timeout=0.05).get("/v1/status"))
    assert error.message.startswith(f"no answer from unix:{tmp_path}/a.sock within 0.05 s")


def test_a_close_without_an_answer(tmp_path: Path) -> None:
    with answering(tmp_path / "a.sock", b""):
        error = failure(lambda: at(tmp_path / "a.sock").get("/v1/status"))
    assert "closed the connection without an answer" in error.message
    assert "admin.allow" not in error.message


def http(status: str, body: bytes, length: int | None = None) -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status.encode(), length or len(body), body)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n",
        http("200 OK", b"<html>"),
        http("200 OK", b"[]"),
        http("404 Not Found", b"no"),
        http("404 Not Found", b'{"detail": "Not Found"}'),
        http("500 Oh", b'{"message": 3, "error": "x"}'),
        http("200 OK", b'{"cut":', 100),
    ],
)
def test_an_answer_that_is_not_ours(tmp_path: Path, answer: bytes) -> None:
    with answering(tmp_path / "a.sock", answer):
        error = failure(lambda: at(tmp_path / "a.sock").get("/v1/status"))
    assert error.message.startswith(f"what answers at unix:{tmp_path}/a.sock is no admin API of frelay")
    assert error.status is None


def test_a_refusal_has_all_its_problems_and_none_of_their_escapes(tmp_path: Path) -> None:
    body = (
        b'{"error": "invalid", "message": "no\\u001b[2J", "problems": [{"key": "func1", "message": "bad"}, '
        b'{"key": "a.b", "file": "/x.toml", "line": 3, "message": "worse\\n"}, {"message": "alone"}]}'
    )
    with answering(tmp_path / "a.sock", http("422 X", body)):
        error = failure(lambda: at(tmp_path / "a.sock").get("/v1/status"))
    assert (error.message, error.status) == (r"no\x1b[2J", 422)
    assert error.details == ("func1: bad", r"/x.toml:3: a.b: worse\n", "alone")
    assert error.body["error"] == "invalid"
