"""Measure two classifiers, one of which only hides its gradients, and see which number to believe.

Runs on a CPU in under a minute, without a download: python examples/evaluate_honestly.py [FOLDER for the reports]
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import robust_moe

torch.manual_seed(0)
pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = (pixels.float() / 16).view(-1, 1, 8, 8)
x, y, x_test, y_test = images[:1500], labels[:1500], images[1500:1600], labels[1500:1600]


class Rounded(nn.Module):
    """A "defence": pixels are rounded to five levels. Its gradient is zero almost everywhere, which stops only PGD."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network((images * 4).round() / 4)


network = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(512, 10)),
)
optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
for _ in range(10):
    for batch in torch.randperm(len(x)).split(50):
        optimizer.zero_grad()
        F.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/evaluate-honestly")
folder.mkdir(parents=True, exist_ok=True)
for name, model in (("plain", network), ("rounded", Rounded(network))):
    for preset in ("quick", "standard"):  # PGD-20; then AutoAttack too, whose Square needs no gradient
        report = folder / f"{name}-{preset}.html"
        numbers = robust_moe.evaluate(model.eval(), x_test, y_test, eps="0.15", preset=preset, report=report)
        low, high = numbers["robust_interval"]
        print(f"{name}, {preset}: clean {numbers['clean']:.0%}, robust {numbers['robust']:.0%} [{low:.0%}, {high:.0%}]")
        for flag in numbers["flags"]:
            if flag["raised"]:
                print(f"  {flag['name']}: {flag['message']}")
        print(f"  report: {report}")
