"""FRELAY_THROUGH_FAULTS: all tests reach their relay through a network with faults (CONTRIBUTING.md)."""

from __future__ import annotations

import os
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import pytest

from support.faults import Conditions, FaultyNetwork, faulty_network

__all__ = ["THROUGH_FAULTS", "direct", "network_asked_for"]

THROUGH_FAULTS: Final = os.environ.get("FRELAY_THROUGH_FAULTS", "")
"""A seed: with it, all parties of all tests reach their relay through a network that splits and merges segments.

Or a range of seeds, such as ``1-200``: then each test gets one of them, always the same, by its name.
"""

direct: Final = pytest.mark.skipif(THROUGH_FAULTS != "", reason="about the one connection between party and relay")
"""Marks a test that is about what waits in the kernel between the two, or that has a network of its own."""


@asynccontextmanager
async def network_asked_for() -> AsyncIterator[FaultyNetwork | None]:
    """The network that FRELAY_THROUGH_FAULTS puts between the parties of this test and its relay; None without it."""
    if not THROUGH_FAULTS:
        yield None
        return
    async with faulty_network(Conditions(_seed_of_this_test(), delays=False)) as network:
        yield network


def _seed_of_this_test() -> int:
    first, _, last = THROUGH_FAULTS.partition("-")
    seed = int(first)
    if last:
        # "tests/e2e/test_x.py::test_y[z] (call)"
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        seed += zlib.crc32(test.encode()) % (int(last) - seed + 1)
    return seed
