"""The entry point of ``robust-moe``: imports nothing of the extra ``[train]`` until it knows that it is there."""

from __future__ import annotations

import sys

__all__ = ["main"]

OURS = ("robust_moe", "robust_moe_kernels")


def main() -> None:
    """Run the command line, or say in one sentence (exit status 2) what has to be installed first."""
    try:
        from robust_moe.commands import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or OURS[0]).partition(".")[0]
        if package in OURS:  # a fault of ours, which no installation mends
            raise
        print(
            f"error: robust-moe needs {package}, which is not installed: "
            'pip install "robust-moe-kernels[train]" brings all it needs',
            file=sys.stderr,
        )
        sys.exit(2)
