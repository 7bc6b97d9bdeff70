"""The image under test, and its containers: ``support/containers.py`` describes both."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from support.containers import Containers, image


@pytest.fixture
async def containers() -> AsyncIterator[Containers]:
    """Runs containers of the image; they are removed at the end."""
    found = Containers(image())
    yield found
    await found.remove()
