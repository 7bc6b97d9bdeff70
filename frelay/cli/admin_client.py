"""The client of the admin API: it finds the API of a relay, and makes calls to it. Standard library only.

The API's address is ``unix:PATH`` or ``HOST:PORT``. It comes from the first of these that is given: ``--admin``, a
route file named with ``-c``, ``FRELAY_ADMIN``, the route file in ``FRELAY_CONFIG``, and ``relay.toml`` in the current
directory. Only ``[admin]`` is read from a route file, so that a file with errors in other sections still leads to its
relay: that is when an operator needs it.

A call returns what the API answered, or raises :class:`CallFailed` with a message that says what to do. Each call has a
connection of its own, unless the :class:`AdminClient` is entered as a context: then they share one.
"""

from __future__ import annotations

import http.client
import json
import os
import pwd
import socket
import ssl
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

from frelay.client.contexts import load_credentials
from frelay.config.address import Address, ip_of, parse_address
from frelay.errors import FrelayError, printable

__all__ = [
    "AdminAddress",
    "AdminClient",
    "Answer",
    "CallFailed",
    "Credentials",
    "UsageError",
    "admin_address_in_file",
    "find_admin_address",
    "parse_admin_address",
    "problem_line",
    "route_path",
]

_DEFAULT_FILE: Final = "relay.toml"
_DEFAULT_LISTEN: Final = "unix:frelay.sock"  # as in AdminSection
# Reading takes milliseconds. A change may read, check and bind a thousand routes.
_READ_TIMEOUT: Final = 10.0
_CHANGE_TIMEOUT: Final = 60.0
# sun_path of unix(7), less its NUL.
_MAX_UNIX_PATH: Final = 107


class UsageError(ValueError):
    """A command was called in a wrong way, such as with an address that is none: exit code 2."""


class CallFailed(FrelayError):
    """A call failed. ``details`` are the problems, one a line.

    ``status`` and ``body`` are the API's answer. Without a status there was no answer: the relay was not reached, or it
    was silent. The relay may still have carried out a request that was sent.
    """

    def __init__(self, message: str, details: tuple[str, ...] = (), *, status: int | None = None, body: Any = None):
        super().__init__(message)
        self.message = printable(message)
        self.details = tuple(printable(line) for line in details)
        self.status = status
        self.body = body


@dataclass(frozen=True, slots=True)
class AdminAddress:
    """Where an admin API listens: ``where`` is a socket's path or an address, ``source`` the option that named it."""

    where: Path | Address
    source: str

    def __str__(self) -> str:
        return f"unix:{self.where}" if isinstance(self.where, Path) else str(self.where)


@dataclass(frozen=True, slots=True)
class Credentials:
    """For an API on TCP: our certificate and its key, and the CA of the relay's certificate with the name in it."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of the API with a status of 2xx; ``body`` is its JSON, or None if it was empty."""

    status: int
    body: Any


# --- finding it ---------------------------------------------------------------------------------------------------


def find_admin_address(admin: str | None, config: Path | None, environ: Mapping[str, str] = os.environ) -> AdminAddress:
    """The address of the API, from ``--admin``, ``-c`` and the environment.

    Raises UsageError for text that is no address, and CallFailed for a route file that names no API.
    """
    if admin is not None:
        return parse_admin_address(admin, "--admin")
    if config is not None:
        return admin_address_in_file(config)
    if environ.get("FRELAY_ADMIN"):
        return parse_admin_address(environ["FRELAY_ADMIN"], "FRELAY_ADMIN")
    return admin_address_in_file(Path(environ.get("FRELAY_CONFIG") or _DEFAULT_FILE))


def parse_admin_address(text: str, source: str, base: Path = Path()) -> AdminAddress:
    """Read ``unix:PATH``, ``HOST:PORT`` or ``https://HOST:PORT``; a relative path starts from ``base``."""
    if text.startswith("unix:"):
        path = base.absolute() / text.removeprefix("unix:")
        if text == "unix:" or "\0" in text or len(os.fsencode(path)) > _MAX_UNIX_PATH:
            raise UsageError(
                f"{source}: {text!r} is not the path of a Unix socket: that has 1 to {_MAX_UNIX_PATH} bytes"
            )
        return AdminAddress(path, source)
    if "/" in (address := text.removeprefix("https://").removesuffix("/")):
        raise UsageError(
            f"{source}: {text!r} is not the address of an admin API: write unix:PATH, HOST:PORT or https://HOST:PORT"
        )
    try:
        return AdminAddress(parse_address(address), source)
    except ValueError as error:
        raise UsageError(f"{source}: {error}; or write unix:PATH") from None


def admin_address_in_file(path: Path) -> AdminAddress:
    """The address that ``[admin]`` of a route file names; raises CallFailed."""
    other = "or name the relay itself with --admin unix:PATH or FRELAY_ADMIN"
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise CallFailed(
            f"there is no route file {path.absolute()} that says where the relay is: name one with -c FILE, {other}"
        ) from None
    except OSError as error:
        raise CallFailed(f"{path.absolute()} cannot be read: {error.strerror}; correct that, {other}") from None
    except ValueError as error:
        raise CallFailed(f"{path.absolute()} is not valid TOML: {error}; correct that, {other}") from None
    admin = table.get("admin")
    if admin is None:
        raise CallFailed(
            f"{path.absolute()} has no [admin] section, and a relay without one has no admin API; add these two "
            "lines to it and restart the relay:",
            ("[admin]", f'listen = "{_DEFAULT_LISTEN}"'),
        )
    listen = admin.get("listen", _DEFAULT_LISTEN) if isinstance(admin, dict) else None
    if not isinstance(listen, str):
        raise CallFailed(
            f'{path.absolute()}: admin.listen is not text such as "{_DEFAULT_LISTEN}"; correct that, {other}'
        )
    try:
        return parse_admin_address(listen, f"admin.listen of {path.absolute()}", path.absolute().parent)
    except UsageError as error:
        raise CallFailed(str(error)) from None


def route_path(name: str) -> str:
    """The path of a route in the API; raises UsageError for a name that no route can have."""
    if not name or "/" in name or name in (".", ".."):
        raise UsageError(f"{name!r} cannot be the name of a route: use letters, digits, '.', '_' and '-'")
    return f"/v1/routes/{quote(name, safe='')}"


# --- calling it ---------------------------------------------------------------------------------------------------


class _Connection(http.client.HTTPConnection):
    """HTTP over the socket that ``dial`` returns."""

    def __init__(self, host: str, dial: Callable[[], socket.socket]) -> None:
        super().__init__(host)
        self._dial: Final = dial

    def connect(self) -> None:
        self.sock = self._dial()


class AdminClient:
    """A relay's admin API. It connects at the first call."""

    def __init__(
        self, address: AdminAddress, credentials: Credentials = Credentials(), *, timeout: float | None = None
    ) -> None:
        """``timeout`` is how long one step of a call may take, in seconds; by default it depends on the call.

        Raises UsageError where the place needs credentials that are missing, CertificateError for those that are wrong.
        """
        self.address: Final = address
        self._timeout: Final = timeout
        self._limit = _READ_TIMEOUT
        self._context: ssl.SSLContext | None = None
        self._name = "localhost"
        if isinstance(address.where, Address):
            self._context = _context(address, credentials)
            # A dot at the end is for the look-up; certificates have names without.
            self._name = (credentials.server_name or _reachable(address.where.host)).removesuffix(".")
        host = f"[{self._name}]" if ":" in self._name else self._name
        self._connection: Final = _Connection(host, self._dial)
        self._is_kept = False

    def __enter__(self) -> Self:
        self._is_kept = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_kept = False
        self._connection.close()

    def get(self, path: str) -> Any:
        """The JSON at ``path``; raises CallFailed."""
        return self.call("GET", path).body

    def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send one request and return the answer; raises CallFailed."""
        self._limit = self._timeout or (_READ_TIMEOUT if method == "GET" else _CHANGE_TIMEOUT)
        sent = {"accept": "application/json", **(headers or {})}
        if body is not None:
            sent["content-type"] = "application/json"
        try:
            self._connection.request(method, path, None if body is None else json.dumps(body).encode(), sent)
            if self._connection.sock is not None:
                self._connection.sock.settimeout(self._limit)
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise self._explained(error) from error
        except BaseException:
            self._connection.close()
            raise
        if not self._is_kept:
            self._connection.close()
        return self._judged(answer.status, content)

    def _dial(self) -> socket.socket:
        where = self.address.where
        if isinstance(where, Path):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(self._limit)
                sock.connect(str(where))
            except BaseException:
                sock.close()
                raise
            return sock
        if self._context is None:
            raise AssertionError("an address without TLS")
        plain = socket.create_connection((_reachable(where.host), where.port), timeout=self._limit)
        try:
            return self._context.wrap_socket(plain, server_hostname=self._name)
        except BaseException:
            plain.close()
            raise

    # --- what went wrong -------------------------------------------------------------------------------------------

    def _explained(self, error: OSError | http.client.HTTPException) -> CallFailed:
        """An error of the operating system, TLS or HTTP, as a message for the operator who has to correct it."""
        address, where = self.address, self.address.where
        if isinstance(error, TimeoutError):
            return CallFailed(
                f"no answer from {address} within {self._limit:g} s: is that relay overloaded or stopped?"
            )
        if isinstance(error, ssl.SSLCertVerificationError):
            return CallFailed(
                f"the certificate of {address} is not valid for {self._name!r} with this --ca: {error.verify_message}; "
                "if the relay's certificate has another name, give that with --server-name"
            )
        if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            return CallFailed(f"{address} does not accept --cert: {_alert(error)}")
        if isinstance(error, ssl.SSLError):
            return CallFailed(f"{address} does not speak TLS as a relay does: {error.reason or error}")
        if isinstance(error, (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)):
            text = f"{address} closed the connection without an answer"
            if isinstance(where, Address):
                text += ": is a name of --cert in the relay's admin.allow? The relay's log says why it refused"
            return CallFailed(text)
        if isinstance(error, http.client.HTTPException):
            return self._not_ours(f"{type(error).__name__}: {error}")
        if isinstance(where, Path):
            return _unix_failure(address, where, error)
        if isinstance(error, ConnectionRefusedError):
            return CallFailed(f"no relay is running at {address}: connection refused (from {address.source})")
        return CallFailed(f"{address} cannot be reached: {error.strerror or error} (from {address.source})")

    def _not_ours(self, what: str) -> CallFailed:
        return CallFailed(f"what answers at {self.address} is no admin API of frelay ({what[:200]})")

    def _judged(self, status: int, content: bytes) -> Answer:
        try:
            body = json.loads(content) if content else None
        except ValueError:
            raise self._not_ours(f"status {status}, and no JSON") from None
        if 200 <= status < 300:
            if body is not None and not isinstance(body, dict):
                raise self._not_ours(f"status {status}, and its JSON is no object")
            return Answer(status, body)
        if not isinstance(body, dict) or not isinstance(body.get("message"), str) or "error" not in body:
            raise self._not_ours(f"status {status}")
        problems = [one for one in body.get("problems") or () if isinstance(one, dict)]
        raise CallFailed(body["message"], tuple(problem_line(one) for one in problems), status=status, body=body)


def problem_line(problem: Mapping[str, Any]) -> str:
    """A problem of the API as one line: ``FILE:LINE: KEY: MESSAGE``, as far as these are known."""
    place = problem.get("file")
    if place and problem.get("line"):
        place = f"{place}:{problem['line']}"
    return ": ".join(str(part) for part in (place, problem.get("key"), problem.get("message")) if part)


def _context(address: AdminAddress, credentials: Credentials) -> ssl.SSLContext:
    wanted = {"--cert": credentials.cert, "--ca": credentials.ca}
    missing = [name for name, value in wanted.items() if value is None]
    if credentials.cert is None or credentials.ca is None:
        raise UsageError(
            f"the admin API at {address} asks for a certificate: {' and '.join(missing)} missing (give --cert, --key "
            "and --ca, or set FRELAY_ADMIN_CERT, FRELAY_ADMIN_KEY and FRELAY_ADMIN_CA)"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    load_credentials(context, credentials.cert, credentials.key, credentials.ca)
    return context


def _reachable(host: str) -> str:
    """``host``, or localhost for a wildcard such as 0.0.0.0: a server can listen there, but nobody can dial it."""
    ip = ip_of(host)
    return "localhost" if ip is not None and ip.is_unspecified else host


def _alert(error: ssl.SSLError) -> str:
    # TLSV13_ALERT_CERTIFICATE_REQUIRED: only what follows ALERT_ helps a reader.
    return str(error.reason).partition("ALERT_")[2].replace("_", " ").lower()


def _unix_failure(address: AdminAddress, path: Path, error: OSError) -> CallFailed:
    if isinstance(error, PermissionError):
        return CallFailed(
            f"permission denied on {path}: the socket is for its owner alone (mode 0600){_owner(path)}: run this as "
            "its owner"
        )
    if isinstance(error, FileNotFoundError):
        return CallFailed(
            f"no relay is running here, or it listens elsewhere: there is no socket {path} (from {address.source})"
        )
    if isinstance(error, ConnectionRefusedError):
        return CallFailed(
            f"no relay is running here: nobody listens at {path}. It is no socket, or a relay that was killed left it "
            f"behind (from {address.source})"
        )
    return CallFailed(f"{path} cannot be reached: {error.strerror or error} (from {address.source})")


def _owner(path: Path) -> str:
    try:
        number = path.stat().st_uid
    except OSError:
        return ""  # we may not look into the directory either
    try:
        return f", {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f", user {number}"
