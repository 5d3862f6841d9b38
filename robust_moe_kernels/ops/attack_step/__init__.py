"""Steps of projected-gradient attacks, and the loss that most of them raise."""

from robust_moe_kernels.ops.attack_step.loss import sample_cross_entropy
from robust_moe_kernels.ops.attack_step.op import ATTACK_STEP, NORMS, pgd_step, random_start

__all__ = ["ATTACK_STEP", "NORMS", "pgd_step", "random_start", "sample_cross_entropy"]
