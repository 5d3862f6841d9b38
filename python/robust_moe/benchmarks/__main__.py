"""``python -m robust_moe.benchmarks``."""

from robust_moe.benchmarks.command import main

if __name__ == "__main__":
    main()
