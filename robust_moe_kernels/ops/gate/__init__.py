"""Top-k gate."""

from robust_moe_kernels.ops.gate.op import GATE, GateOutput, top_k_gate, top_k_route

__all__ = ["GATE", "GateOutput", "top_k_gate", "top_k_route"]
