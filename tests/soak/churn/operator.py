"""A restless operator: each of its changes must be made, or be refused with nothing changed."""

from __future__ import annotations

import os
import random
import signal
from typing import Final

import trio

from soak.churn.ground import Ground, Trouble, ask

__all__ = ["Operator"]


class Operator:
    """An operator who changes the relay all the time."""

    def __init__(self, ground: Ground, random_: random.Random) -> None:
        self._ground: Final = ground
        self._random: Final = random_
        self._number = 0

    async def act(self) -> None:
        """One change by the operator."""
        await self._random.choice(
            (self._hang_up, self._storm, self._add_and_delete, self._reload, self._look, self._slip)
        )()

    async def _hang_up(self) -> None:
        os.kill(self._ground.pid, signal.SIGHUP)

    async def _storm(self) -> None:
        for _ in range(50):
            os.kill(self._ground.pid, signal.SIGHUP)

    async def _add_and_delete(self) -> None:
        self._number += 1
        path = f"/v1/routes/extra-{self._number}"
        table = {"listen": "127.0.0.1:0", "func1": "dns:func1.demo", "func2": "dns:func2.demo"}
        status, view = await ask(self._ground, "PUT", path, table)
        if status != 201:
            raise Trouble(f"PUT was answered {status}: {view}")
        port = int(view["bound"][0].rpartition(":")[2])
        await trio.aclose_forcefully(await trio.open_tcp_stream("127.0.0.1", port))
        status, answer = await ask(self._ground, "DELETE", path)
        if status != 204:
            raise Trouble(f"DELETE was answered {status}: {answer}")

    async def _reload(self) -> None:
        status, answer = await ask(self._ground, "POST", "/v1/reload")
        if status != 200:
            raise Trouble(f"a reload was answered {status}: {answer}")

    async def _look(self) -> None:
        for path in ("/v1/status", "/v1/routes", "/v1/pairings"):
            status, _ = await ask(self._ground, "GET", path)
            if status != 200:
                raise Trouble(f"{path} was answered {status}")

    async def _slip(self) -> None:
        """A typing error: the reload is refused, and nothing changes."""
        try:
            self._rewrite(self._ground.configuration() + "\n[[route")
            status, answer = await ask(self._ground, "POST", "/v1/reload")
            if status != 409:
                raise Trouble(f"a reload of half a file was answered {status}: {answer}")
        finally:
            self._rewrite(self._ground.configuration())
        await self._reload()

    def _rewrite(self, text: str) -> None:
        new = self._ground.route_file.with_suffix(".new")
        new.write_text(text)
        new.replace(self._ground.route_file)
