"""The ``frelay`` command, and ``python -m frelay``.

A function may have frelay alone (``pip install --no-deps``), which is enough for :func:`frelay.connect` and not
for the command; so it is here that the command finds out, before anything else is imported.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command; where a library is missing, say which one in a line, and exit with 1."""
    from frelay.client.installed import has_client_only

    if has_client_only():
        print(
            "frelay: frelay-client has no commands; for these, pip uninstall it and pip install frelay", file=sys.stderr
        )
        sys.exit(1)
    try:
        from frelay.cli.app import main as run

        run()
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "frelay"):
            raise  # a fault of ours, not of the installation
        print(
            f"frelay: the library {name} is not installed, and the command needs it "
            "(frelay.connect does not): install frelay without --no-deps",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
