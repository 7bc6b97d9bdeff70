"""frelay beside other relays and forwarders: what bench/compare.py measures, judges and shows.

The command is ``python bench/compare.py``. A package of the name ``compare`` beside it would hide it from ``import``.
"""
