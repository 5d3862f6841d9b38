"""Seeds for every use of a seed."""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed for one use of ``seed``, e.g. ``derive_seed(0, "attack", step)``; the same on every platform."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
