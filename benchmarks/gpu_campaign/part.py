"""One part as a process of its own: ``python -m benchmarks.gpu_campaign.part MODULE --lines FILE ...``."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

from benchmarks.gpu_campaign.record import Record

__all__ = ["main"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--data", type=Path)
    asked = parser.parse_args()
    record = Record(asked.lines, asked.folder, asked.seconds, asked.dry_run, asked.data)
    try:
        found = importlib.import_module(asked.module).run(record)
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip() or "no message").splitlines()[0]
        record.finish(f"{type(error).__name__}: {first}")
        return 1
    record.finish(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
