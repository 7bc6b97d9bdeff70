"""Logging: one event a line, for a person or as JSON, on stderr.

Every value that came from outside (names in certificates, addresses, reasons) goes through a renderer that escapes
control characters, so a certificate cannot forge a log line or move a terminal's cursor. Secrets are never passed to
the log in the first place.

Traffic must not wait for the log. If the log cannot be written (the disk is full, the terminal is closed, its reader
has gone), lines are lost, and a later line says how many. The hardest case is a pipe whose reader has stopped reading:
a write to it does not fail, it *waits*, and in the event loop it would stop every pairing of the relay. So lines go
through a bounded queue to a thread, and only that thread waits; see :class:`LineWriter`.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any, Final, Literal, TextIO

import structlog

__all__ = ["LEVELS", "LineWriter", "LogFormat", "configure"]

LogFormat = Literal["console", "json"]
LEVELS: Final = ("debug", "info", "warning", "error")

# What a busy relay logs in some seconds; at a few hundred bytes a line it is about a megabyte.
_LONGEST_QUEUE: Final = 4096
# How long a line may wait to be written together with others, in seconds: too short for a person to notice.
_GATHERING: Final = 0.01
# The kernel writes up to so many bytes to a pipe in one piece, even when others write to it, too: all workers of a
# relay share one log.
_AT_ONCE: Final = select.PIPE_BUF
# How long the process waits at its end for lines that nobody reads, in seconds.
_CLOSE_TIMEOUT: Final = 2.0


class LineWriter:
    """Writes lines to a descriptor, in order, from a thread of its own; :meth:`write` neither waits nor fails.

    While the queue is full, lines are dropped, and so is a line whose write fails. The writer counts them and writes in
    their place a line that ``note`` makes of their number, before it writes any later line.

    To wake a thread for one line costs more than the line, since both threads then want the interpreter. So a line
    wakes the thread only if it sleeps. The thread then waits a moment for more lines, and writes all at once.

    It writes to the descriptor directly. A stream like ``sys.stderr`` has a lock that the interpreter takes at its end,
    and a thread that hangs in a write would hold that lock.
    """

    def __init__(self, descriptor: int, note: Callable[[int], str], *, longest_queue: int = _LONGEST_QUEUE) -> None:
        self._descriptor: Final = descriptor
        self._note: Final = note
        self._longest_queue: Final = longest_queue
        self._queue: Final[deque[str | int]] = deque()
        """Lines; and, where lines were dropped, their number."""
        self._is_torn = False
        """Whether the last write ended in the middle of a line."""
        self._is_closing = False
        self._is_asleep = False
        """Whether the thread sleeps until somebody wakes it."""
        self._news: Final = threading.Condition()
        # A daemon, because one that hangs in a write must not keep the process from its end.
        self._thread: Final = threading.Thread(target=self._run, name="frelay log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Queue ``line``, which ends with a line end."""
        with self._news:
            last = self._queue[-1] if self._queue else ""
            if len(self._queue) < self._longest_queue:
                self._queue.append(line)
            elif isinstance(last, int):
                self._queue[-1] = last + 1
            else:
                self._queue.append(1)
            self._wake()

    def _wake(self) -> None:
        if self._is_asleep:
            self._is_asleep = False
            self._news.notify()

    def flush(self) -> None:
        """Do nothing: the thread writes each line as soon as it can."""

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """Write what is queued, or as much of it as can be written within ``timeout`` seconds."""
        with self._news:
            self._is_closing = True
            self._wake()
        self._thread.join(timeout)

    # --- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        missing = 0
        while self._sleep_until_news():
            while entries := self._next():
                if isinstance(entries, int):
                    missing += entries
                if missing and self._put([_encoded(self._note(missing))]) == 1:
                    missing = 0
                if not isinstance(entries, int):
                    missing += len(entries) - (0 if missing else self._put(entries))

    def _sleep_until_news(self) -> bool:
        """Wait until there is something to write; False at the end."""
        with self._news:
            while not self._queue and not self._is_closing:
                self._is_asleep = True
                self._news.wait()
            if not self._queue:
                return False
            is_closing = self._is_closing
        if not is_closing:
            select.select((), (), (), _GATHERING)  # a change of the clock does not affect it
        return True

    def _next(self) -> list[bytes] | int:
        """The number that comes next, or as many lines as may go in one write."""
        lines: list[bytes] = []
        left = _AT_ONCE
        with self._news:
            while self._queue:
                first = self._queue[0]
                if isinstance(first, int):
                    return lines or int(self._queue.popleft())
                line = _encoded(first)
                left -= len(line)
                if lines and left < 0:
                    break
                lines.append(line)
                self._queue.popleft()
        return lines

    def _put(self, lines: list[bytes]) -> int:
        """Write all of ``lines``, however long that takes; gives how many of them were written whole."""
        data = b"".join(lines)
        if self._is_torn:
            data = b"\n" + data
        while data:
            try:
                written = os.write(self._descriptor, data)
            except BlockingIOError:
                # Another process that shares this terminal or pipe may have made it non-blocking for all of them.
                select.select((), (self._descriptor,), ())
                continue
            except OSError:
                return len(lines) - _lines_in(data, lines)
            self._is_torn = not data[:written].endswith(b"\n")
            data = data[written:]
        return len(lines)


def _encoded(line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace")


def _lines_in(rest: bytes, lines: Sequence[bytes]) -> int:
    """How many of ``lines`` are not written whole yet, if ``rest`` is the unwritten end of their joined text."""
    count, left = 0, len(rest)
    for line in reversed(lines):
        if left <= 0:
            break
        left -= len(line)
        count += 1
    return count


# --- what a line looks like -------------------------------------------------------------------------------------------


def _escape(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _escape_values(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Make control characters in values visible: a terminal would obey them. JSON escapes them by itself."""
    for key, value in event.items():
        if isinstance(value, str) and key != "timestamp":
            event[key] = _escape(value)
    return event


def _write_traceback(out: TextIO, error: Any) -> None:
    """Write ``error`` with every line indented: it may quote a stranger's text, which must not look like an event."""
    text = io.StringIO()
    structlog.dev.plain_traceback(text, error)
    for line in text.getvalue().strip("\n").split("\n"):
        out.write(f"\n    {_escape(line)}")


def _render_json(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    text = structlog.processors.JSONRenderer(ensure_ascii=True, default=str)(logger, method, event)
    # DEL is the only control character that JSON does not escape. It can only be in strings, so the result is JSON.
    return str(text).replace("\x7f", "\\u007f")


def _processors(format_: LogFormat, *, colours: bool) -> list[Any]:
    ending: list[Any]
    if format_ == "json":
        ending = [structlog.processors.format_exc_info, _render_json]
    else:
        console = structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=20, exception_formatter=_write_traceback)
        ending = [_escape_values, console]
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *ending,
    ]


def _render_note(processors: Sequence[Any], count: int) -> str:
    """The line that stands for ``count`` dropped ones. It cannot go through the logger, which leads to the queue."""
    event: Any = {"event": "log lines dropped", "count": count}
    for processor in processors:
        event = processor(None, "warning", event)
    return f"{event}\n"


# --- setting it up ----------------------------------------------------------------------------------------------------


def configure(format_: LogFormat = "console", level: str = "info", descriptor: int | None = None) -> LineWriter:
    """Have structlog write to ``descriptor`` (stderr if it is None); the queue is written when the process ends.

    ``level`` is one of :data:`LEVELS`.
    """
    out = _stderr() if descriptor is None else descriptor
    # watchfiles logs every raw event at INFO; the reloader logs those that matter.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    processors = _processors(format_, colours=os.isatty(out) and not os.environ.get("NO_COLOR"))
    writer = LineWriter(out, partial(_render_note, processors))
    atexit.register(writer.close)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(writer),  # type: ignore[arg-type]  # all of a file that it needs
        # Not cached: tests and the demo configure more than once in a process.
        cache_logger_on_first_use=False,
    )
    return writer


def _stderr() -> int:
    if sys.stderr is not None:
        try:
            return sys.stderr.fileno()
        except io.UnsupportedOperation:
            return 2  # a test has replaced sys.stderr by a text, to catch error messages and not the log
    # stderr was closed when the process began, and the next descriptor that is opened may get its number: a party's.
    return os.open(os.devnull, os.O_WRONLY)
