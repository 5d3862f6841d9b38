"""Single paths through a routed model as dense networks: the "robust subnetwork" that "Robust Experts" (Pavlitska et
al., 2025, arXiv:2509.05086, section 5) suggests to look for, with the lottery ticket hypothesis in mind.

It finds that single experts may be more robust than the gated model (figure 8, switch loss). ``expert_losses``
measures each expert on held-out images, ``robust_path`` chooses, ``extract_path`` makes the network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from robust_moe.attacks import Attack, attack_mode
from robust_moe.attacks.losses import cross_entropy
from robust_moe.models.mixture import NetworkExperts
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import moe_layers, only_expert

__all__ = ["expert_losses", "extract_path", "robust_path"]


def expert_losses(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    index: Tensor | None = None,
    batch_size: int = 256,
) -> dict[str, Tensor]:
    """Cross-entropy of each image where it is attacked through each expert: [N, E], by the layer's name.

    Every image goes to that expert of the layer with weight 1, attack included; other layers route as they do. Choose
    by images that nothing is reported on afterwards.

    Args:
        model: with routed layers; left exactly as found.
        x: float [N, C, H, W] in [0, 1], on the model's device.
        y: int64 [N].
        attack: from the same start for each expert.
        index: int64 [N], positions in the data set, counters of the random starts; None: 0..N-1.
        batch_size: images a forward.

    Raises:
        ValueError: a model without routed layers; what the attack refuses.
        FloatingPointError: a gradient that is not finite.
    """
    layers = moe_layers(model)
    expect(len(layers) > 0, "model", "at least one mixture-of-experts layer", "none")
    index = torch.arange(len(x), device=x.device) if index is None else index
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        columns = []
        for expert in range(layer.num_experts):
            losses = []
            with only_expert(layer, expert):
                for images, labels, places in zip(*(of.split(batch_size) for of in (x, y, index)), strict=True):
                    attacked = attack(model, images, labels, places)
                    with attack_mode(model), torch.no_grad():
                        losses.append(cross_entropy(model(attacked), labels))
            columns.append(torch.cat(losses))
        found[name] = torch.stack(columns, 1)
    return found


def robust_path(losses: Mapping[str, Tensor]) -> dict[str, int]:
    """The expert of the lowest mean loss in each layer, ties to the lowest index.

    Of several layers each is chosen for itself, while the others routed as they do: the path need not be the best of
    all, and its own loss is to be measured on the extracted network.

    Args:
        losses: [N, E] by layer, as from :func:`expert_losses`; N >= 1.

    Raises:
        ValueError: losses of another shape, or that are not finite.
    """
    path = {}
    for name, table in losses.items():
        argument = f"losses[{name!r}]"
        expect(table.ndim == 2 and table.numel() > 0, argument, "shape [N, E], N and E >= 1", list(table.shape))
        expect(bool(table.isfinite().all()), argument, "finite numbers", "NaN or infinity")
        path[name] = int(table.double().mean(0).argmin())
    return path


def extract_path(model: nn.Module, path: Mapping[str, int]) -> nn.Module:
    """The dense network that ``model`` is along one path: each layer replaced by one expert, with weight 1.

    It has its own parameters, in the model's mode, and in evaluation the outputs of the model with these experts fixed,
    at the cost of one path without gates. Of a mixture of networks it is one network; where that mixes probabilities,
    followed by a log-softmax. Batch norms outside of the experts keep the statistics of all paths: train, or let some
    batches pass in train mode, to fit them.

    Args:
        model: not changed.
        path: an expert for every routed layer, by name.

    Raises:
        ValueError: layers left out, or that the model has not; an expert out of range; layers with momentum, which an
            expert alone does not hand on.
    """
    layers = moe_layers(model)
    expect(len(layers) > 0, "model", "at least one mixture-of-experts layer", "none")
    ok = path.keys() == layers.keys()
    expect(ok, "path", f"an expert for each of {', '.join(map(repr, layers))}", ", ".join(map(repr, path)) or "none")
    experts: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        expect(layer.momentum is None, f"model layer {name!r}", "no momentum", layer.momentum)
        network = layer.expert(path[name])
        if isinstance(layer.experts, NetworkExperts) and layer.experts.domain == "probabilities":
            network = nn.Sequential(network, nn.LogSoftmax(1))
        experts[name] = network.train(layer.training)
    if "" in experts:  # the model is the layer
        return experts[""]
    dense = copy.deepcopy(model)
    replaced = {id(layer): experts[name] for name, layer in moe_layers(dense).items()}
    for name, module in list(dense.named_modules(remove_duplicate=False)):  # a layer may stand in several places
        if id(module) in replaced:
            dense.set_submodule(name, replaced[id(module)])
    return dense
