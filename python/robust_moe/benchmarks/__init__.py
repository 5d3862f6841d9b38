"""How fast this machine is: ``python -m robust_moe.benchmarks --help``. One harness, one file a subject, results with
their provenance as JSON."""
