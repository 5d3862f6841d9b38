"""``python -m robust_moe.runs.worker train ...``: ``robust-moe train ...`` for one run of a sweep.

SIGTERM saves and stops, and so does the end of the sweep's own process: no run outlives it unseen.
"""

from __future__ import annotations

from robust_moe.cli import main
from robust_moe.workers import stop_with_parent

if __name__ == "__main__":
    stop_with_parent()
    main()
