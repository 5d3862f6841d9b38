"""Fails unless the installed package works on a CPU with its dependencies alone: kernels, modules, attacks, models,
benchmarks. ``check_import.py MODE [--bare]``: built with RMK_BUILD=MODE; --bare: and triton is not installed."""

import importlib.util
import subprocess
import sys

import torch

from robust_moe.attacks import PGD
from robust_moe.models import MoEConfig, ResNet18Config, build_model
from robust_moe_kernels import FusedConvMoE, env
from robust_moe_kernels.ops.attack_step import pgd_step

mode = sys.argv[1]
assert importlib.util.find_spec("torchvision") is None
assert "--bare" not in sys.argv or importlib.util.find_spec("triton") is None
rows = env.report()
for row in rows:
    expected = row.device == "cpu" and row.impl in (("reference",) if mode == "none" else ("reference", "native"))
    assert row.available == expected, row
    assert row.available or row.reason, row
layer = FusedConvMoE.from_conv(torch.nn.Conv2d(3, 8, 3, padding=1), num_experts=3)
x = torch.rand(5, 3, 6, 6, requires_grad=True)
layer(x).sum().backward()
stepped = pgd_step(x, x.grad, x, 8 / 255, 2 / 255)
assert stepped.shape == x.shape and (stepped - x).abs().max() > 0
config = ResNet18Config(width=4, moe=MoEConfig(layers=["layer4.1"], num_experts=3))
model = build_model(config, num_classes=10, channels=3, image_size=8)
images = torch.rand(4, 3, 8, 8)
moved = (PGD(eps=8 / 255, steps=2)(model, images, torch.arange(4)) - images).abs().max()
assert 0 < moved <= 8 / 255 + 1e-6
program = [sys.executable, "-m", "robust_moe.benchmarks", "--quick", "--device", "cpu", "routing_ops", "attack_step"]
timed = subprocess.run(program, capture_output=True, text=True)
assert timed.returncode == 0 and ("native" in timed.stdout) == (mode != "none"), timed.stdout + timed.stderr
print(f"RMK_BUILD={mode}: {sum(row.available for row in rows)} implementations run, torch {torch.__version__}")
