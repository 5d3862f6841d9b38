"""Benchmarks: ``python -m benchmarks --help``. One harness, one file a subject, results with their provenance as
JSON."""
