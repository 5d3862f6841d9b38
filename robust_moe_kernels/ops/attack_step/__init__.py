"""Steps of projected-gradient attacks."""

from robust_moe_kernels.ops.attack_step.op import ATTACK_STEP, NORMS, pgd_step, random_start

__all__ = ["ATTACK_STEP", "NORMS", "pgd_step", "random_start"]
