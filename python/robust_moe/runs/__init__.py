"""Many runs at once: what their folders say, side by side."""

from robust_moe.runs.page import write_page
from robust_moe.runs.summary import RunSummary, find_runs, read_run
from robust_moe.runs.table import runs_table, write_csv

__all__ = ["RunSummary", "find_runs", "read_run", "runs_table", "write_csv", "write_page"]
