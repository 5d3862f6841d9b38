"""Benchmarks of a clone: ``python -m benchmarks --help``. What a user times on a machine of his own is in
``robust_moe.benchmarks``; here are the programs that need the clone, and the results."""
