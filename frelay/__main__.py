"""``python -m frelay``: the same as the ``frelay`` command."""

from frelay.cli.app import main

main()
