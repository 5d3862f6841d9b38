"""What the operations between the convolutions of routed blocks are given, and its checks."""

from __future__ import annotations

from torch import Tensor

from robust_moe_kernels.checks import expect
from robust_moe_kernels.operands import Operands, expect_offsets, expect_order, expect_together

__all__ = ["OPERANDS", "checked_head", "checked_norm"]

_TABLES = "scale{0} float [E, C]; shift{0} float [E, C]"
_NORM = "shares float64 [2, S, E, C]; offsets int64 [E+1]"
_SKIP_MAPS = "skip_scale? float [E, C]; skip_shift? float [E, C]"
_ROUTE = "order int64 [R]; inverse int64 [R]; offsets int64 [E+1]; weights float [B, k]"
OPERANDS = {
    name: Operands(table)
    for name, table in {
        "column_sums": "value float [R, C, H, W]; other float [R, C, H, W]; offsets int64 [E+1]; "
        + _TABLES.format("?"),
        "norm_finalise": f"{_NORM}; weight float [E, C]; bias float [E, C]; running_mean float [E, C];"
        " running_var float [E, C]; tracked int64 [E]",
        "norm_finalise_backward": f"{_NORM}; scale table [E, C]; mean scale [E, C]; rstd scale [E, C]",
        "scale_shift": "z float [R, C, H, W]; offsets int64 [E+1]; " + _TABLES.format(""),
        "norm_backward": "d float [R, C, H, W]; z float [R, C, H, W]; offsets int64 [E+1]; p float [E, C];"
        " q? float [E, C]; r? float [E, C]; " + _TABLES.format("?"),
        "head": f"z float [R, C, H, W]; {_TABLES.format('')}; x float [N, C, H, W]; {_SKIP_MAPS}; {_ROUTE}",
        "head_backward": f"d_out float [B, C, H, W]; z float [R, C, H, W]; {_TABLES.format('')};"
        f" x float [N, C, H, W]; {_SKIP_MAPS}; {_ROUTE}",
        "sum_rows": "rows float [R, C, H, W]; other float [R, C, H, W]; inverse int64 [R]",
    }.items()
}


def checked_head(
    x: Tensor, skip_scale: Tensor | None, skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor,
    sizes: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Order, inverse and offsets, contiguous; raises where they are no route of B samples with k experts each."""
    expect_together(skip_scale, "skip_scale", skip_shift, "skip_shift")
    rows, pairs = sizes["R"], sizes["B"] * sizes["k"]
    expect(sizes["k"] >= 1 and rows == pairs, "weights", f"shape [B, k] with B * k = R = {rows}", f"{pairs} pairs")
    maps = sizes["B"] if skip_scale is None else rows
    expect(sizes["N"] == maps, "x", f"{maps} maps", sizes["N"])
    return *expect_order(order, inverse), expect_offsets(offsets, rows)


def checked_norm(offsets: Tensor, pixels: int, sizes: dict[str, int]) -> Tensor:
    """Contiguous offsets; raises where they, the number of pixels or that of shares is out of range."""
    expect(sizes["S"] >= 1, "shares", "at least one share", sizes["S"])
    expect(0 <= pixels < 2**31, "pixels", "0 <= pixels < 2^31", pixels)
    return expect_offsets(offsets, None)
