"""The ``frelay`` command."""
