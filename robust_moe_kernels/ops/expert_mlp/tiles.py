"""Which tile computes a product of the routed MLP in Triton.

All are estimates, from compiled code and from what the grouped convolution's tiles measured on an H100
(expert_conv/tiles.json): there 92 programs of 128x256 were faster than twice as many of 128x128, on 132
multiprocessors. A hidden layer's epilogue issues 2,000 to 4,000 instructions a warp, as many as a product of 1,000
channels; two programs of 128x128 on a multiprocessor overlap them, which one of 128x256 does not.
"""

from __future__ import annotations

from typing import NamedTuple

from robust_moe_kernels.ops.expert_conv.tiles import SHARED, SHARED_ELSEWHERE, Gpu, Tile

__all__ = ["CHOICES", "ELEMENT", "Choice", "choose", "compiles"]


class Choice(NamedTuple):
    """A tile, and how its sums are worked on."""

    tile: Tile
    pieces: int = 1  # parts of the columns that an epilogue takes one after the other: fewer registers
    registers: int = 255  # the most a thread may have by descriptor, so that three programs share a multiprocessor
    depth: int = 0  # the least channels summed over that it is for

    def options(self, described: bool) -> dict[str, int]:
        """``described``: with matrices by descriptor, without which addresses take registers from the sums. Left to
        itself, the assembler spills some to fit more programs on a multiprocessor (sm_100)."""
        return self.tile.options() | {"maxnreg": self.registers if described else 255}


# By kernel and kind of operand (of expert_conv's tiles), largest first; the last one serves where no other does.
CHOICES: dict[str, dict[str, tuple[Choice, ...]]] = {
    "hidden": {
        "half": (
            Choice(Tile(128, 256, 64, 8, 4), 8, depth=768),
            Choice(Tile(128, 128, 64, 8, 3), 4),
            Choice(Tile(64, 128, 64, 4, 3), 4),
            Choice(Tile(64, 64, 64, 4, 4), 2),
        ),
        "tf32": (Choice(Tile(128, 128, 32, 8, 3), 4), Choice(Tile(64, 64, 32, 4, 4), 2)),
        "ieee": (Choice(Tile(64, 64, 16, 8, 3)),),
        "narrow": (Choice(Tile(64, 64, 32, 4, 2), 4),),
    },
    "rows": {
        "half": (
            Choice(Tile(128, 256, 64, 8, 4)),
            Choice(Tile(128, 128, 64, 8, 3)),
            Choice(Tile(64, 128, 64, 4, 3)),
            Choice(Tile(64, 64, 64, 4, 4)),
        ),
        "tf32": (Choice(Tile(128, 128, 32, 8, 3)), Choice(Tile(64, 64, 32, 4, 4))),
        "ieee": (Choice(Tile(64, 64, 16, 8, 3)),),
        "narrow": (Choice(Tile(64, 64, 32, 4, 2)),),
    },
    "hidden_backward": {
        "half": (
            Choice(Tile(64, 128, 64, 4, 3), 8, 168),
            Choice(Tile(64, 128, 64, 4, 3), 8),
            Choice(Tile(64, 64, 64, 4, 4), 4),
        ),
        "tf32": (Choice(Tile(64, 64, 32, 4, 4), 4),),
        "ieee": (Choice(Tile(64, 64, 16, 8, 3), 4),),
        "narrow": (Choice(Tile(64, 64, 32, 4, 2), 4),),
    },
    "matrix": {
        "half": (Choice(Tile(128, 128, 64, 8, 3)), Choice(Tile(64, 64, 64, 4, 4))),
        "tf32": (Choice(Tile(128, 128, 32, 8, 4)), Choice(Tile(64, 64, 32, 4, 4))),
        "ieee": (Choice(Tile(64, 64, 16, 8, 3)),),
        "narrow": (Choice(Tile(64, 64, 16, 4, 2)),),
    },
}
ELEMENT = {"half": 2, "tf32": 4, "ieee": 4, "narrow": 4}


def compiles(kernel: str, choice: Choice, kind: str, capability: int) -> bool:
    """Whether GPUs of a compute capability are given a choice: it fits their shared memory, and what limits registers
    was seen not to spill, which on sm_100 it does by 4 to 8 bytes."""
    if choice.registers < 255 and capability != 90:
        return False
    return choice.tile.shared(ELEMENT[kind]) <= SHARED.get(capability, SHARED_ELSEWHERE)


def choose(kernel: str, kind: str, rows: int, columns: int, depth: int, gpu: Gpu) -> Choice:
    """The largest tile that the GPU has the memory for, that fills two thirds of its multiprocessors and computes less
    than a third more columns than there are; else the last one.

    Args:
        kernel, kind: of CHOICES.
        rows, columns: of the target; columns are those of both halves of a gated layer.
        depth: channels summed over, or 0 for a weight gradient.
        gpu: that computes it.

    Raises:
        ValueError: no tile fits the GPU's shared memory.
    """
    fitting = [
        choice
        for choice in CHOICES[kernel][kind]
        if choice.tile.shared(ELEMENT[kind]) <= gpu.shared and compiles(kernel, choice, kind, gpu.capability)
    ]
    if not fitting:
        raise ValueError(f"tile: expected a GPU with more shared memory for one, got {gpu.shared} bytes")
    for choice in fitting:
        across = -(-columns // choice.tile.n)
        filled = 3 * (rows // choice.tile.m) * across >= 2 * gpu.multiprocessors
        if filled and depth >= choice.depth and 3 * across * choice.tile.n < 4 * columns:
            return choice
    return fitting[-1]
