"""A function that uses ``frelay.connect`` where nothing but Python and the package ``frelay`` is installed.

Usage: ``python -I -S frelay_function.py SETTINGS``: -I and -S leave the standard library alone on the path, and the
folder that holds ``frelay`` is added by hand. SETTINGS is a JSON object with package, address, size, and the keyword
arguments of ``connect``. What it found goes to stdout as one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

CHUNK = 256 * 1024


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    size: int = settings["size"]
    story: dict[str, Any] = {"path": list(sys.path)}
    sys.path.insert(0, settings["package"])

    import frelay

    received, left = hashlib.sha256(), size
    data = hashlib.sha256(settings["arguments"]["cert"].encode()).digest() * (size // 32)
    with frelay.connect(settings["address"], **settings["arguments"]) as wire:
        story["role"] = "server" if wire.server_side else "client"
        if story["role"] == "client":
            wire.sendall(data)
            wire.send_eof()
        while chunk := wire.recv(min(CHUNK, left + 1)):
            received.update(chunk)
            left -= len(chunk)
        if story["role"] == "server":
            wire.sendall(data)
    story["missing"] = left
    story["sent"], story["received"] = hashlib.sha256(data).hexdigest(), received.hexdigest()
    # All modules but those of the standard library, of frelay and of this script.
    story["foreign"] = sorted(
        name
        for name in {module.partition(".")[0] for module in sys.modules} - {"frelay", "__main__", "__mp_main__"}
        if name not in sys.stdlib_module_names
    )
    print(json.dumps(story))


main()
