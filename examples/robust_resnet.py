"""Fine-tune a trained timm ResNet adversarially, its last block routed experts: what that keeps, costs and brings.

Runs on a CPU in under a minute, without a download: python examples/robust_resnet.py
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from robust_moe.analysis import model_cost
from robust_moe.attacks import PGD
from robust_moe_kernels import balance_loss, moe_layers, replace_blocks

torch.manual_seed(0)
pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = (pixels.float() / 16).view(-1, 1, 8, 8)
x, y, x_test, y_test = images[:1500], labels[:1500], images[1500:], labels[1500:]
attack = PGD(eps=0.1, steps=4)


def train(model, epochs, attacked):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            seen = attack(model, x[batch], y[batch]) if attacked else x[batch]
            loss = F.cross_entropy(model.train()(seen), y[batch]) + 0.1 * balance_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def report(name, model):
    """Accuracy, and what one image costs."""
    given = (x_test, attack(model.eval(), x_test, y_test))
    clean, robust = ((model(images).argmax(1) == y_test).float().mean() for images in given)
    cost = model_cost(model, x_test[:1])
    print(f"{name}: clean {clean:.1%}, attacked {robust:.1%};", end=" ")
    print(f"{cost.parameters:,} parameters, {cost.multiply_adds:,} multiply-adds an image")


resnet = timm.create_model("resnet18d", in_chans=1, num_classes=10, stem_width=8, channels=(16, 32, 32, 64))
resnet.maxpool = torch.nn.Identity()  # a digit has 8 x 8 pixels
train(resnet, epochs=6, attacked=False)
report("trained on digits", resnet)

before = resnet(x_test)
replace_blocks(resnet, "layer4.1", num_experts=4, top_k=1)  # init="copy": every expert starts as the block
print(f"logits move by at most {(resnet(x_test) - before).abs().max():.0e}: a trained network keeps its function")
report("four experts, one used", resnet)

train(resnet, epochs=6, attacked=True)
report("after fine-tuning", resnet)
resnet(x_test)
for name, layer in moe_layers(resnet).items():
    print(f"{name}: images per expert {layer.last_routing().indices.flatten().bincount(minlength=4).tolist()}")
