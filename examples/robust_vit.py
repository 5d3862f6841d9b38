"""Make a timm ViT robust: train it, turn its last MLP into routed experts, and train those on attacked digits.

Runs on a CPU in under a minute, without a download: python examples/robust_vit.py
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from robust_moe.attacks import PGD
from robust_moe_kernels import balance_loss, moe_layers, replace_mlps

torch.manual_seed(0)
pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = (pixels.float() / 16).view(-1, 1, 8, 8)
x, y, x_test, y_test = images[:1500], labels[:1500], images[1500:], labels[1500:]
attack = PGD(eps=0.1, steps=4)


def train(model, epochs, attacked):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            seen = attack(model, x[batch], y[batch]) if attacked else x[batch]
            loss = F.cross_entropy(model.train()(seen), y[batch]) + 0.1 * balance_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, given in (("clean", x_test), ("attacked", attack(model.eval(), x_test, y_test))):
        print(f"{name} digits: {(model(given).argmax(1) == y_test).float().mean():.1%} right")


vit = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=3
)
train(vit, epochs=10, attacked=False)
replace_mlps(vit, "blocks.1.mlp", num_experts=4, top_k=2)  # as it was: every expert starts as the MLP
train(vit, epochs=10, attacked=True)
for name, layer in moe_layers(vit).items():
    print(f"{name}: tokens per expert {layer.last_routing().indices.flatten().bincount(minlength=4).tolist()}")
