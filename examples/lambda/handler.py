"""A Lambda function (or any other with a handler) that asks the other function of its route something.

It sends its event as JSON, ends its direction, and returns the JSON that comes back. Everything it needs is in its
environment:

    FRELAY_RELAY   relay.example:9001
    FRELAY_PEER    dns:func2.demo, who the other function must be
    FRELAY_CERT    this function's certificate, its key, and the CA: the PEM texts themselves
    FRELAY_KEY
    FRELAY_CA
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import frelay

# What is kept back of the time limit: for the answer, and for saying in the log what went wrong. Whoever is stopped by
# the platform says nothing.
RESERVE = 3.0
# Where files live in memory, if the platform has it; Lambda has not, and its /tmp belongs to one sandbox alone.
MEMORY = "/dev/shm"  # noqa: S108  only ever used for a new directory of mode 0700


@contextmanager
def credentials() -> Iterator[dict[str, str]]:
    """The PEM texts of the environment as files, for as long as it takes to read them."""
    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    # Mode 0700, and the files in it 0600; gone at the end, whatever happens.
    with tempfile.TemporaryDirectory(prefix="frelay-", dir=memory) as directory:
        paths = {}
        for name in ("cert", "key", "ca"):
            # Consoles and deployment tools tend to turn line ends into "\n" in two characters.
            pem = os.environ[f"FRELAY_{name.upper()}"].replace("\\n", "\n")
            path = Path(directory, f"{name}.pem")
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(pem)
            paths[name] = str(path)
        yield paths


def handler(event: Any, context: Any) -> Any:
    """What the platform calls; its exceptions are the platform's to log, and to retry where that is set up."""
    wait = context.get_remaining_time_in_millis() / 1000 - RESERVE
    with credentials() as paths:
        wire = frelay.connect(
            os.environ["FRELAY_RELAY"],
            cert=paths["cert"],
            key=paths["key"],
            ca=paths["ca"],
            peer=os.environ["FRELAY_PEER"],
            wait=wait,
            retry=True,  # the relay restarts, the other function is stopped in mid-handshake: all within the same wait
        )
    # Closed before we return: between two calls the sandbox is frozen, and a frozen function answers nobody.
    with wire:
        wire.settimeout(context.get_remaining_time_in_millis() / 1000 - RESERVE / 2)
        wire.sendall(json.dumps(event).encode())
        wire.send_eof()
        with wire.makefile("rb") as answer:
            return json.load(answer)
