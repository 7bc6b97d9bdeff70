"""Fixtures for all tests; ``support/site.py`` and ``support/certs.py`` describe what they give."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import frelay.tls  # noqa: F401  before anything else loads OpenSSL: see there
from support.site import Site

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so, CI among them, and the processes that the tests start would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A directory with certificates and room for a route file."""
    return Site(tmp_path)
