"""A Lambda function (or any other with a handler) that sends a question to the other function of its route.

It sends its event as JSON, ends its direction, and returns the JSON that comes back. Its environment has everything
that it needs:

    FRELAY_RELAY   relay.example:9001
    FRELAY_PEER    dns:func2.demo, the name that the other function must have
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

# Seconds of the time limit that we keep for the answer, and for writing an error into the log: a function that the
# platform stops can write nothing.
RESERVE = 3.0
# A directory in memory, if the platform has one. Lambda has none, but only this sandbox can read its /tmp.
MEMORY = "/dev/shm"  # noqa: S108  only ever used for a new directory of mode 0700


@contextmanager
def credentials() -> Iterator[dict[str, str]]:
    """The PEM texts of the environment as files, which exist only within the ``with`` block."""
    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    # The directory has mode 0700 and its files 0600. It is removed at the end, also after an error.
    with tempfile.TemporaryDirectory(prefix="frelay-", dir=memory) as directory:
        paths = {}
        for name in ("cert", "key", "ca"):
            # Many consoles and deployment tools replace a newline by the two characters "\n".
            pem = os.environ[f"FRELAY_{name.upper()}"].replace("\\n", "\n")
            path = Path(directory, f"{name}.pem")
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(pem)
            paths[name] = str(path)
        yield paths


def handler(event: Any, context: Any) -> Any:
    """The platform calls this. It logs an exception, and calls again if you have set that up."""
    wait = context.get_remaining_time_in_millis() / 1000 - RESERVE
    with credentials() as paths:
        wire = frelay.connect(
            os.environ["FRELAY_RELAY"],
            cert=paths["cert"],
            key=paths["key"],
            ca=paths["ca"],
            peer=os.environ["FRELAY_PEER"],
            wait=wait,
            retry=True,  # for example if the relay restarts; `wait` limits all tries together
        )
    # Close it before we return: between two calls the sandbox is frozen, and a frozen function cannot answer.
    with wire:
        wire.settimeout(context.get_remaining_time_in_millis() / 1000 - RESERVE / 2)
        wire.sendall(json.dumps(event).encode())
        wire.send_eof()
        with wire.makefile("rb") as answer:
            return json.load(answer)
