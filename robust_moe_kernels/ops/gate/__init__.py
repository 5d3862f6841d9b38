"""Top-k gate."""

from robust_moe_kernels.ops.gate import flops  # noqa: F401  registers what the fused gate counts as
from robust_moe_kernels.ops.gate.op import GATE, GateOutput, expect_finite, top_k_gate, top_k_route
from robust_moe_kernels.ops.gate.pool import pool_linear

__all__ = ["GATE", "GateOutput", "expect_finite", "pool_linear", "top_k_gate", "top_k_route"]
