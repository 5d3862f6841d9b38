"""``python -m robust_moe``: the command ``robust-moe``, as ``torchrun -m robust_moe train CONFIG`` runs it."""

from robust_moe.cli import main

if __name__ == "__main__":
    main()
