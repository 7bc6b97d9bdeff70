"""Tests for faults that only time shows: ``soak.py`` runs as long as you ask, ``test_churn.py`` for seconds."""
