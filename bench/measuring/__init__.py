"""What every script here measures with: load, subjects, rounds, CPU time, and how a script runs and reports."""
