"""Logging: one event a line, for a person or as JSON, on stderr.

Every value that came from outside (names in certificates, addresses, reasons) goes through a renderer that escapes
control characters, so a certificate cannot forge a log line or move a terminal's cursor. Secrets are never passed to
the log in the first place. And a log that cannot be written (a full disk, a closed terminal) is dropped: traffic is
worth more than its description.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, Final, Literal, TextIO

import structlog

__all__ = ["LEVELS", "LogFormat", "configure"]

LogFormat = Literal["console", "json"]
LEVELS: Final = ("debug", "info", "warning", "error")


class _PatientFile:
    """A stream whose failures do not reach the caller."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ENOSPC, EPIPE, EAGAIN; ValueError: closed
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            pass


def _escape(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Make control characters in values visible; JSON escapes them by itself, a terminal would obey them."""
    for key, value in event.items():
        if isinstance(value, str) and key not in ("exception", "timestamp") and not value.isprintable():
            event[key] = value.encode("unicode_escape").decode("ascii")
    return event


def configure(format_: LogFormat = "console", level: str = "info", stream: TextIO | None = None) -> None:
    """Set structlog up for this process; ``level`` is one of :data:`LEVELS`."""
    out = stream or sys.stderr
    # It tells of every raw event at INFO; what matters of them is logged by us.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    renderer: Any
    if format_ == "json":
        renderer = structlog.processors.JSONRenderer(ensure_ascii=True, default=str)
        ending: list[Any] = [structlog.processors.format_exc_info, renderer]
    else:
        colours = out.isatty() and not _no_color()
        renderer = structlog.dev.ConsoleRenderer(
            colors=colours, pad_event_to=20, exception_formatter=structlog.dev.plain_traceback
        )
        ending = [_escape, renderer]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *ending,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(_PatientFile(out)),  # type: ignore[arg-type]
        # Not cached: tests and the demo configure more than once in a process.
        cache_logger_on_first_use=False,
    )


def _no_color() -> bool:
    return bool(os.environ.get("NO_COLOR"))
