"""Many runs at once: grids of settings, and what run folders say, side by side."""

from robust_moe.runs.grid import grid
from robust_moe.runs.page import write_page
from robust_moe.runs.summary import RunSummary, find_runs, read_run
from robust_moe.runs.sweep import plan_sweep, run_sweep
from robust_moe.runs.table import runs_table, write_csv

__all__ = [
    "RunSummary",
    "find_runs",
    "grid",
    "plan_sweep",
    "read_run",
    "run_sweep",
    "runs_table",
    "write_csv",
    "write_page",
]
