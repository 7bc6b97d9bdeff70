"""The client of the admin API: where a relay's API is, and one call there. Standard library only.

Its place is ``unix:PATH`` or ``HOST:PORT``, and comes from the first of these that is given: ``--admin``, a route file
named with ``-c``, ``FRELAY_ADMIN``, the route file in ``FRELAY_CONFIG``, and ``relay.toml`` here. Of a route file only
``[admin]`` is read, so a file that is wrong elsewhere still leads to its relay, which is when one needs it.

A call gives what the API answered, or raises :class:`CallFailed` with a message that says what to do. Each call has a
connection of its own, unless the :class:`Remote` is entered as a context: then they share one.
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

from frelay.client.wire import load_credentials
from frelay.config.address import Address, ip_of, parse_address
from frelay.errors import FrelayError, printable

__all__ = [
    "Answer",
    "BadPlace",
    "CallFailed",
    "Credentials",
    "Place",
    "Remote",
    "find",
    "parse_place",
    "place_in_file",
    "problem_line",
    "route_path",
]

_DEFAULT_FILE: Final = "relay.toml"
_DEFAULT_LISTEN: Final = "unix:frelay.sock"  # as in AdminSection
# A look takes milliseconds. A change may read, judge and bind a thousand routes.
_LOOK_TIME: Final = 10.0
_CHANGE_TIME: Final = 60.0
# sun_path of unix(7), less its NUL.
_MAX_UNIX_PATH: Final = 107


class BadPlace(ValueError):
    """The place of an API was given in a way that cannot be meant: a usage error."""


class CallFailed(FrelayError):
    """A call that did not do what was asked: ``details`` are the problems, a line each.

    ``status`` and ``body`` are the API's answer, where it was one. Without a status the relay was not reached, or did
    not answer; it may have done what it was asked for all the same if that was sent.
    """

    def __init__(self, message: str, details: tuple[str, ...] = (), *, status: int | None = None, body: Any = None):
        super().__init__(message)
        self.message = printable(message)
        self.details = tuple(printable(line) for line in details)
        self.status = status
        self.body = body


@dataclass(frozen=True, slots=True)
class Place:
    """Where an admin API listens: ``where`` is a socket's path or an address, ``said_by`` what named it."""

    where: Path | Address
    said_by: str

    def __str__(self) -> str:
        return f"unix:{self.where}" if isinstance(self.where, Path) else str(self.where)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What is shown to an API on TCP, and what its relay is judged by; a Unix socket needs none of it."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API answered: 2xx, with ``body`` as its JSON, or None where there was none."""

    status: int
    body: Any


# --- finding it ---------------------------------------------------------------------------------------------------


def find(admin: str | None, config: Path | None, environ: Mapping[str, str] = os.environ) -> Place:
    """The place of the API, from ``--admin``, ``-c`` and the environment.

    Raises BadPlace for an address that is none, and CallFailed for a route file that leads nowhere.
    """
    if admin is not None:
        return parse_place(admin, "--admin")
    if config is not None:
        return place_in_file(config)
    if environ.get("FRELAY_ADMIN"):
        return parse_place(environ["FRELAY_ADMIN"], "FRELAY_ADMIN")
    return place_in_file(Path(environ.get("FRELAY_CONFIG") or _DEFAULT_FILE))


def parse_place(text: str, said_by: str, base: Path = Path()) -> Place:
    """Read ``unix:PATH``, ``HOST:PORT`` or ``https://HOST:PORT``; a relative path starts from ``base``."""
    if text.startswith("unix:"):
        path = base.absolute() / text.removeprefix("unix:")
        if text == "unix:" or "\0" in text or len(os.fsencode(path)) > _MAX_UNIX_PATH:
            raise BadPlace(f"{said_by}: {text!r} is not a socket's path, which has 1 to {_MAX_UNIX_PATH} bytes")
        return Place(path, said_by)
    if "/" in (address := text.removeprefix("https://").removesuffix("/")):
        raise BadPlace(
            f"{said_by}: {text!r} is no place of an admin API: write unix:PATH, HOST:PORT or https://HOST:PORT"
        )
    try:
        return Place(parse_address(address), said_by)
    except ValueError as error:
        raise BadPlace(f"{said_by}: {error}; or write unix:PATH") from None


def place_in_file(path: Path) -> Place:
    """The place that ``[admin]`` of a route file names; raises CallFailed."""
    other = "--admin unix:PATH or FRELAY_ADMIN finds a relay without its file"
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise CallFailed(
            f"there is no route file {path.absolute()} to find the relay by: name it with -c FILE; {other}"
        ) from None
    except OSError as error:
        raise CallFailed(f"{path.absolute()} cannot be read: {error.strerror}; {other}") from None
    except ValueError as error:
        raise CallFailed(f"{path.absolute()} is not valid TOML: {error}; {other}") from None
    admin = table.get("admin")
    if admin is None:
        raise CallFailed(
            f"{path.absolute()} has no [admin] section, and a relay without one cannot be asked; add these two lines "
            "to it and restart the relay:",
            ("[admin]", f'listen = "{_DEFAULT_LISTEN}"'),
        )
    listen = admin.get("listen", _DEFAULT_LISTEN) if isinstance(admin, dict) else None
    if not isinstance(listen, str):
        raise CallFailed(f'{path.absolute()}: admin.listen is not text such as "{_DEFAULT_LISTEN}"; {other}')
    try:
        return parse_place(listen, f"admin.listen of {path.absolute()}", path.absolute().parent)
    except BadPlace as error:
        raise CallFailed(str(error)) from None


def route_path(name: str) -> str:
    """The path of a route in the API; raises BadPlace for what cannot even be asked for."""
    if not name or "/" in name or name in (".", ".."):
        raise BadPlace(f"{name!r} cannot be the name of a route: letters, digits, '.', '_' and '-'")
    return f"/v1/routes/{quote(name, safe='')}"


# --- calling it ---------------------------------------------------------------------------------------------------


class _Connection(http.client.HTTPConnection):
    """HTTP over whatever ``dial`` gives."""

    def __init__(self, host: str, dial: Callable[[], socket.socket]) -> None:
        super().__init__(host)
        self._dial: Final = dial

    def connect(self) -> None:
        self.sock = self._dial()


class Remote:
    """A relay's admin API. Make it from a place; nothing is connected before the first call."""

    def __init__(self, place: Place, credentials: Credentials = Credentials(), *, timeout: float | None = None) -> None:
        """``timeout`` is how long one step of a call may take, in seconds; by default it depends on the call.

        Raises BadPlace where the place needs credentials that are missing, CertificateError for those that are wrong.
        """
        self.place: Final = place
        self._timeout: Final = timeout
        self._limit = _LOOK_TIME
        self._context: ssl.SSLContext | None = None
        self._name = "localhost"
        if isinstance(place.where, Address):
            self._context = _context(place, credentials)
            # A dot at the end is for the look-up; certificates have names without.
            self._name = (credentials.server_name or _reachable(place.where.host)).removesuffix(".")
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
        """Ask for one thing; raises CallFailed."""
        self._limit = self._timeout or (_LOOK_TIME if method == "GET" else _CHANGE_TIME)
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
        where = self.place.where
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
        """What the operating system, TLS or HTTP said, in words for whoever has to mend it."""
        place, where = self.place, self.place.where
        if isinstance(error, TimeoutError):
            return CallFailed(f"no answer from {place} within {self._limit:g} s: is that relay overloaded or stopped?")
        if isinstance(error, ssl.SSLCertVerificationError):
            return CallFailed(
                f"{place} shows a certificate that --ca does not vouch for as {self._name!r}: {error.verify_message}; "
                "--server-name names another one"
            )
        if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            return CallFailed(f"{place} does not accept --cert: {_alert(error)}")
        if isinstance(error, ssl.SSLError):
            return CallFailed(f"{place} does not speak TLS as a relay does: {error.reason or error}")
        if isinstance(error, (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)):
            text = f"{place} closed the connection without an answer"
            if isinstance(where, Address):
                text += ": is a name of --cert in the relay's admin.allow? Its log says whom it refused, and why"
            return CallFailed(text)
        if isinstance(error, http.client.HTTPException):
            return self._not_ours(f"{type(error).__name__}: {error}")
        if isinstance(where, Path):
            return _unix_failure(place, where, error)
        if isinstance(error, ConnectionRefusedError):
            return CallFailed(f"no relay is running at {place}: connection refused (from {place.said_by})")
        return CallFailed(f"{place} cannot be reached: {error.strerror or error} (from {place.said_by})")

    def _not_ours(self, what: str) -> CallFailed:
        return CallFailed(f"what answers at {self.place} is no admin API of frelay ({what[:200]})")

    def _judged(self, status: int, content: bytes) -> Answer:
        try:
            body = json.loads(content) if content else None
        except ValueError:
            raise self._not_ours(f"status {status}, and no JSON") from None
        if 200 <= status < 300:
            if body is not None and not isinstance(body, dict):
                raise self._not_ours(f"status {status}, and JSON of another kind")
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


def _context(place: Place, credentials: Credentials) -> ssl.SSLContext:
    wanted = {"--cert": credentials.cert, "--ca": credentials.ca}
    missing = [name for name, value in wanted.items() if value is None]
    if credentials.cert is None or credentials.ca is None:
        raise BadPlace(
            f"the admin API at {place} asks for a certificate: {' and '.join(missing)} missing (give --cert, --key and "
            "--ca, or set FRELAY_ADMIN_CERT, FRELAY_ADMIN_KEY and FRELAY_ADMIN_CA)"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    load_credentials(context, credentials.cert, credentials.key, credentials.ca)
    return context


def _reachable(host: str) -> str:
    """``host``, or localhost where it stands for every address: that can be listened on, but not called."""
    ip = ip_of(host)
    return "localhost" if ip is not None and ip.is_unspecified else host


def _alert(error: ssl.SSLError) -> str:
    # TLSV13_ALERT_CERTIFICATE_REQUIRED; what is in front of the last word pair says nothing to anybody.
    return str(error.reason).partition("ALERT_")[2].replace("_", " ").lower()


def _unix_failure(place: Place, path: Path, error: OSError) -> CallFailed:
    if isinstance(error, PermissionError):
        return CallFailed(
            f"permission denied on {path}: the socket is for its owner alone (mode 0600){_owner(path)}: run this as "
            "its owner"
        )
    if isinstance(error, FileNotFoundError):
        return CallFailed(
            f"no relay is running here, or it listens elsewhere: there is no socket {path} (from {place.said_by})"
        )
    if isinstance(error, ConnectionRefusedError):
        return CallFailed(
            f"no relay is running here: nobody listens at {path}, which is no socket or was left behind by a relay "
            f"that was killed (from {place.said_by})"
        )
    return CallFailed(f"{path} cannot be reached: {error.strerror or error} (from {place.said_by})")


def _owner(path: Path) -> str:
    try:
        number = path.stat().st_uid
    except OSError:
        return ""  # the directory is closed to us, too
    try:
        return f", {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f", user {number}"
