"""The general path is the layer: same values, gradients, statistics and errors; and what only it can do."""

from __future__ import annotations

import copy
import warnings

import any_blocks
import pytest
import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from robust_moe.models.mixture import ExpertMixture
from robust_moe_kernels import FusedBlockMoE, FusedConvMoE, FusedMLPMoE, balance_loss, replace_blocks
from robust_moe_kernels.modules import MoELayer, SoftGradient, SwapTop, general_path, rerouted


def skip(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))


def networks(**options) -> MoELayer:
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 5)) for _ in range(4)]
    gate = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 4))
    return ExpertMixture(gate, heads, in_channels=8, routing="top_k", **options)


def of_any_kind(name: str, **options) -> MoELayer:
    return FusedBlockMoE.from_block(any_blocks.BLOCKS[name](), 4, init="fresh", **options)


LAYERS = {
    "basic": lambda **o: FusedBlockMoE.from_block(BasicBlock(8, 8), 4, init="fresh", **o),
    "basic, stride 2": lambda **o: FusedBlockMoE.from_block(BasicBlock(8, 12, 2, skip(8, 12)), 4, init="fresh", **o),
    "squeeze and excitation": lambda **o: of_any_kind("squeeze and excitation", **o),
    "pre-activation": lambda **o: of_any_kind("pre-activation", **o),
    "bottleneck": lambda **o: FusedBlockMoE.from_block(Bottleneck(8, 2), 4, init="fresh", **o),
    "convolution": lambda **o: FusedConvMoE.from_conv(nn.Conv2d(8, 6, 3), 4, init="fresh", **o),
    "networks": networks,
    "mlp": lambda **o: FusedMLPMoE.from_mlp(Mlp(6, 10), 4, init="fresh", **o),  # the images' lines are its tokens
}
ROUTES = {
    "k=2": {"top_k": 2},
    "k=1, straight through": {"top_k": 1},
    "k=1, plain": {"top_k": 1, "renormalize": False, "straight_through": False},
    "k=E": {"top_k": 4},
}


def layer(name: str, **options) -> MoELayer:
    torch.manual_seed(0)
    made = LAYERS[name](**options)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return made.double()


def images(count: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 8, 6, 6, generator=generator, dtype=torch.float64)


def step(moe: MoELayer, x: Tensor) -> dict[str, Tensor]:
    moe.zero_grad()
    x = x.clone().requires_grad_()
    out = moe(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    ((out * weight).sum() + 3 * balance_loss(moe, "entropy") + balance_loss(moe, "z")).backward()
    found = {"output": out.detach(), "x": x.grad}
    found |= {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in moe.named_parameters()}
    return found | dict(moe.named_buffers())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # double precision; some thousand additions of numbers of magnitude 1 to 100
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_layer(name: str, routes: str, training: bool):
    moe = layer(name, **ROUTES[routes]).train(training)
    plain = copy.deepcopy(moe)
    plain.impl = "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who asks for it is not warned
        found = step(plain, images())
    assert_same(found, step(moe, images()))


@pytest.mark.parametrize("name", ["basic", "mlp"])
@pytest.mark.parametrize("reroute", [SwapTop(), SoftGradient()], ids=repr)
def test_imposed_routes_are_taken(reroute, name: str):
    moe = layer(name, top_k=1).eval()
    with rerouted(moe, reroute):
        wanted = step(moe, images())
        with general_path():
            assert_same(step(moe, images()), wanted)


def test_everywhere_inside_the_context_and_nowhere_after():
    model = replace_blocks(nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)), ["0", "1"], num_experts=2).eval()
    x = images().float().requires_grad_()

    def fused(out: Tensor) -> bool:
        seen, nodes = set(), [out.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [inner for inner, _ in node.next_functions]
        return any("RoutedBlock" in type(node).__name__ or "robust_moe" in type(node).__name__ for node in seen)

    assert fused(model(x))
    with general_path():
        assert not fused(model(x))
    assert fused(model(x))
    model[0].impl = model[1].impl = "reference"
    assert not fused(model(x))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl: expected one of auto, reference, got 'fast'"):
        layer("basic", impl="fast")


def test_nonfinite_scores_are_refused_here_too():
    moe = layer("basic", impl="reference")
    with pytest.raises(ValueError, match=r"logits: expected finite gate scores, got NaN or infinity in 1 row\(s\)"):
        moe(images().index_fill(0, torch.tensor([3]), torch.nan))


def test_an_empty_batch():
    for name in LAYERS:
        moe = layer(name).eval()
        with general_path():
            assert moe(images(0)).shape == moe(images())[:0].shape


# --- derivatives of gradients -------------------------------------------------------------------------------------


def penalty(moe: MoELayer, x: Tensor) -> dict[str, Tensor]:
    moe.zero_grad()
    x = x.clone().requires_grad_()
    loss = moe(x).square().sum() + balance_loss(moe, "entropy")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.square().sum().backward()
    return {"x": x.grad} | {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in moe.named_parameters()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("routes", ["k=2", "k=1, straight through"])
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_of_the_fused_layer(name: str, routes: str, training: bool):
    """In float32, which the engine computes, against the general path in double precision."""
    moe = layer(name, **ROUTES[routes]).train(training)
    plain, fused = copy.deepcopy(moe), copy.deepcopy(moe).float()
    plain.impl = "reference"
    wanted, found = penalty(plain, images()), penalty(fused, images().float())
    for key, value in wanted.items():
        error = (found[key].double() - value).norm() / value.norm().clamp_min(1e-6)
        assert error < 1e-3, key  # a ReLU within rounding of zero may open in one and not in the other


@pytest.mark.parametrize("name", ["convolution", "mlp"])
def test_third_derivatives(name: str):
    moe = layer(name, top_k=2).eval()

    def third(moe: MoELayer) -> Tensor:
        x = images(2).requires_grad_()
        value = moe(x).sigmoid().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.square().sum()
        return gradient

    with general_path():
        wanted = third(moe)
    torch.testing.assert_close(third(moe), wanted, rtol=1e-8, atol=1e-10)


def test_what_an_attack_does_not_keep_is_said():
    moe = layer("basic, stride 2").float().eval().requires_grad_(False)
    x = images().float().requires_grad_()
    with pytest.raises(RuntimeError, match=r'use impl="reference" on the layer'):
        torch.autograd.grad(moe(x).square().sum(), x, create_graph=True)


def test_numbers_changed_between_forward_and_backward_are_noticed():
    moe = layer("basic").float()
    out = moe(images().float()).sum()
    with torch.no_grad():
        moe.experts[2].conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["basic", "convolution", "mlp"])
@pytest.mark.parametrize("expert", [0, 2])
def test_filters_changed_in_place_are_noticed_frozen_or_not(name: str, frozen: bool, expert: int):
    moe = layer(name).float().eval().requires_grad_(not frozen)
    x = images().float().requires_grad_()
    out = moe(x).sum()
    with torch.no_grad():
        next(p for p in moe.experts[expert].parameters() if p.dim() >= 2).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, x)


@pytest.mark.parametrize("name", ["basic", "basic, stride 2"])
def test_what_a_gradient_does_not_read_may_change_before_it(name: str):
    """As of ordinary layers: running statistics by another forward, and biases."""
    moe = layer(name).float().eval()
    first = moe(images().float()).sum()
    second = moe.train()(images().float()).sum()
    with torch.no_grad():
        moe.experts[1].bn2.bias.add_(1)
    (first + second).backward()
    assert moe.experts[1].conv1.weight.grad.isfinite().all()


# --- checkpointing ------------------------------------------------------------------------------------------------


def test_a_balance_loss_without_a_gradient_is_refused():
    moe = layer("basic").train()
    x = images().requires_grad_()
    checkpoint(moe, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        balance_loss(moe)
    with torch.no_grad():
        assert balance_loss(moe) < 0  # the value alone
    checkpoint(moe, x, use_reentrant=False)
    balance_loss(moe).backward()
    assert moe.gate.fc.weight.grad.any()
    moe.gate.requires_grad_(False)
    checkpoint(moe, x, use_reentrant=True)
    balance_loss(moe)  # there is nothing to train


def test_under_a_transformation_in_training_each_norm_sees_its_own_rows():
    """As an ordinary norm must be for ``torch.func``, without running statistics that move."""
    moe = layer("basic", top_k=1).train()
    wanted = copy.deepcopy(moe)(images()).sum()
    for expert in moe.experts:
        for norm in (expert.bn1, expert.bn2):
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = False
    with pytest.warns(UserWarning, match="plain PyTorch"):
        gradient, value = torch.func.grad_and_value(lambda x: moe(x).sum())(images())
    torch.testing.assert_close(value, wanted)
    assert gradient.isfinite().all()


def test_a_trace_in_training_is_refused():
    with (
        pytest.raises(ValueError, match="layer: expected eval mode where a forward is traced"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.jit.trace(layer("basic").train(), (images(),))


@pytest.mark.filterwarnings("ignore:torch.func transforms")
@pytest.mark.parametrize("name", ["convolution", "mlp"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_mapped_forward_leaves_no_record(gradients: bool, name: str):
    """Its tensors end with the mapping; inside of it the record can be read, by a balance loss for one."""
    moe = layer(name).eval()
    moe(images())

    def loss(image: Tensor) -> Tensor:
        return moe(image[None]).square().mean() + balance_loss(moe)

    mapped = torch.vmap(torch.func.grad(loss) if gradients else loss)(images())
    assert moe.routing is None
    with pytest.raises(RuntimeError, match="expected a forward"):
        balance_loss(moe)
    x = images()[:1].requires_grad_()
    alone = moe(x).square().mean() + balance_loss(moe)
    expected = torch.autograd.grad(alone, x)[0] if gradients else alone
    torch.testing.assert_close(mapped[:1], expected.reshape(mapped[:1].shape))
    torch.vmap(torch.func.grad(lambda image: torch.func.grad(loss)(image).sum()))(images())  # each has ended
    assert moe.routing is None
    torch.func.grad(loss)(images()[0])
    assert isinstance(moe.last_routing().scores + 1, Tensor)  # a gradient alone leaves numbers


def test_experts_that_are_no_module_are_refused_under_a_transformation():
    class Halves:
        """As ``ExpertModule`` describes it, and no more."""

        num_experts, in_channels = 4, 8

        def __init__(self) -> None:
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def parameters(self):
            return iter([self.weight])

    moe = MoELayer(layer("convolution").gate, Halves())
    with (
        pytest.warns(UserWarning, match="torch.func transforms"),
        pytest.raises(TypeError, match=r"layer\.experts: expected a torch\.nn\.Module .* got Halves"),
    ):
        torch.vmap(lambda image: moe(image[None]))(images())
