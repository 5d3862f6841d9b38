"""The ops. Each folder is a noun and holds the op's public functions, its specification and its implementations.

``OPS`` is the table that ``robust-moe env``, the tests and the compile check read; a new op is one folder and one line
here.
"""

from robust_moe_kernels.dispatch import Op
from robust_moe_kernels.ops.apgd import APGD
from robust_moe_kernels.ops.attack_step import ATTACK_STEP
from robust_moe_kernels.ops.expert_block import EXPERT_BLOCK
from robust_moe_kernels.ops.expert_conv import EXPERT_CONV
from robust_moe_kernels.ops.expert_mlp import EXPERT_MLP
from robust_moe_kernels.ops.gate import GATE
from robust_moe_kernels.ops.permute import PERMUTE
from robust_moe_kernels.ops.routing import ROUTING

OPS: dict[str, Op] = {
    op.name: op for op in (GATE, ROUTING, PERMUTE, EXPERT_CONV, EXPERT_BLOCK, EXPERT_MLP, ATTACK_STEP, APGD)
}

__all__ = ["OPS"]
