"""Routed MLP: two linear layers with an activation between them, as experts of rows sorted by expert."""

from robust_moe_kernels.ops.expert_mlp.activation import ACTIVATIONS, Activation
from robust_moe_kernels.ops.expert_mlp.op import EXPERT_MLP, expert_mlp

__all__ = ["ACTIVATIONS", "EXPERT_MLP", "Activation", "expert_mlp"]
