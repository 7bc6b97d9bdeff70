"""Tests for what only time shows: ``soak.py`` for as long as one likes, ``test_churn.py`` for a moment."""
