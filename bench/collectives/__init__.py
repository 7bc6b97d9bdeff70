"""Groups of processes that talk to each other: what bench/groups.py measures, and beside whom."""
