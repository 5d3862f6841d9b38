"""State, copies, precision and memory format of the mixture layers."""

from __future__ import annotations

import copy
import io
import pickle

import any_blocks
import torch
import torchvision.models.resnet as torchvision_resnet
from pytest import mark, raises
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robust_moe_kernels import FusedBlockMoE, FusedConvMoE, FusedMLPMoE, balance_loss
from robust_moe_kernels.modules import MoELayer
from robust_moe_kernels.modules.experts import by_expert

pytestmark = mark.usefixtures("one_thread")


def downsample(inplanes: int, planes: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, 2, bias=False), nn.BatchNorm2d(planes))


def basic(**options) -> FusedBlockMoE:
    return FusedBlockMoE.from_block(torchvision_resnet.BasicBlock(8, 8), 3, init="fresh", **options)


def bottleneck(**options) -> FusedBlockMoE:
    block = torchvision_resnet.Bottleneck(8, 3, 2, downsample(8, 12))
    return FusedBlockMoE.from_block(block, 3, init="fresh", **options)


def conv(**options) -> FusedConvMoE:
    return FusedConvMoE.from_conv(nn.Conv2d(8, 6, 3), 3, init="fresh", **options)


def excited(**options) -> FusedBlockMoE:
    """Off the engine, as the next one, whose norms are of a class with an activation."""
    return FusedBlockMoE.from_block(any_blocks.BLOCKS["squeeze and excitation"](), 3, init="fresh", **options)


def preactivated(**options) -> FusedBlockMoE:
    return FusedBlockMoE.from_block(any_blocks.BLOCKS["pre-activation"](), 3, init="fresh", **options)


def mlp(**options) -> FusedMLPMoE:
    """Of tokens as wide as the images, whose lines are tokens then."""
    return FusedMLPMoE.from_mlp(Mlp(6, 10), 3, init="fresh", **options)


LAYERS = {"basic": basic, "bottleneck": bottleneck, "conv": conv, "mlp": mlp}
LAYERS |= {"excited": excited, "preactivated": preactivated}
OF_MAPS = [name for name in LAYERS if name != "mlp"]


def norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def of_three(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"experts.{expert}.{name}": shape for expert in range(3) for name, shape in shapes.items()}


GAP_FC = {"gate.fc.weight": (3, 8), "gate.fc.bias": (3,)}
BASIC = {
    "conv1.weight": (8, 8, 3, 3), **norm_shapes("bn1", 8), "conv2.weight": (8, 8, 3, 3), **norm_shapes("bn2", 8)
}  # fmt: skip
BOTTLENECK = {
    "conv1.weight": (3, 8, 1, 1),
    **norm_shapes("bn1", 3),
    "conv2.weight": (3, 3, 3, 3),
    **norm_shapes("bn2", 3),
    "conv3.weight": (12, 3, 1, 1),
    **norm_shapes("bn3", 12),
    "downsample.0.weight": (12, 8, 1, 1),
    **norm_shapes("downsample.1", 12),
}
EXCITED = BASIC | {
    f"se.fc{layer}.{part}": shape for layer in (1, 2) for part, shape in (("weight", (8, 8, 1, 1)), ("bias", (8,)))
}
PREACTIVATED = {
    **norm_shapes("norm1", 8),
    "conv1.weight": (8, 8, 1, 1),
    **norm_shapes("norm2", 8),
    "conv2.weight": (8, 8, 3, 3),
    **norm_shapes("norm3", 8),
    "conv3.weight": (8, 8, 1, 1),
}
MLP = {"fc1.weight": (10, 6), "fc1.bias": (10,), "fc2.weight": (6, 10), "fc2.bias": (6,)}
EXPERTS = {"basic": BASIC, "bottleneck": BOTTLENECK, "conv": {"weight": (6, 8, 3, 3), "bias": (6,)}, "mlp": MLP}
EXPERTS |= {"excited": EXCITED, "preactivated": PREACTIVATED}
GATES = {name: {"gate.fc.weight": (3, 6)} if name == "mlp" else GAP_FC for name in EXPERTS}
# The stable part of the interface: checkpoints hold these names and shapes.
SHAPES = {name: {**GATES[name], **of_three(shapes)} for name, shapes in EXPERTS.items()}


def images(batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 8, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def trained(name: str, **options) -> MoELayer:
    """A layer whose statistics have moved and whose last forward hangs on its graph."""
    torch.manual_seed(0)
    moe = LAYERS[name](**options)
    (moe(images()).square().mean() + balance_loss(moe)).backward()
    return moe


# --- state dict -------------------------------------------------------------------------------------------------------


@mark.parametrize("name", LAYERS)
def test_the_state_has_the_documented_names_and_shapes(name: str):
    state = trained(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == SHAPES[name]


def test_the_state_with_a_convolution_gate():
    gate = {key for key in basic(gate="conv_gap").state_dict() if key.startswith("gate.")}
    assert gate == {"gate.conv.weight"}


def test_a_downsample_keeps_the_names_of_its_parts():
    block = torchvision_resnet.BasicBlock(8, 6, 2)
    block.downsample = nn.Sequential()
    block.downsample.add_module("conv", nn.Conv2d(8, 6, 1, 2, bias=False))
    block.downsample.add_module("norm", nn.BatchNorm2d(6))
    moe = FusedBlockMoE.from_block(block.eval(), 3)
    assert "experts.1.downsample.conv.weight" in moe.state_dict()
    # Single precision; three convolutions of sums of at most 72 terms.
    torch.testing.assert_close(moe.expert(2)(images()), block(images()), rtol=1e-4, atol=1e-4)


@mark.parametrize("name", LAYERS)
def test_a_state_loads_into_a_fresh_layer(name: str):
    moe = trained(name).eval()
    buffer = io.BytesIO()
    torch.save(moe.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(1)
    fresh = LAYERS[name]().eval()
    assert not torch.equal(fresh(images()), moe(images()))
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(fresh(images()), moe(images()))
    for key, value in moe.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


@mark.parametrize("name", LAYERS)
def test_a_state_with_stacked_experts_loads_too(name: str):
    """As checkpoints had them once: the names without the expert's number, and a leading dimension E."""
    moe = trained(name)
    state = {key: value for key, value in moe.state_dict().items() if key.startswith("gate.")}
    for part in EXPERTS[name]:
        state[f"experts.{part}"] = torch.stack([moe.state_dict()[f"experts.{expert}.{part}"] for expert in range(3)])
    kept = {key: value.clone() for key, value in state.items()}
    fresh = LAYERS[name]()
    fresh.load_state_dict(state, strict=True)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in moe.state_dict().items())
    assert state.keys() == kept.keys()  # the caller's own state is not changed


def test_a_stacked_state_of_one_layer_under_two_names_has_the_names_of_today():
    layer = conv()
    model = nn.ModuleDict({"one": layer, "other": layer})
    own = layer.experts.state_dict()
    stacked = {part: torch.stack([own[f"{expert}.{part}"] for expert in range(3)]) for part in ("weight", "bias")}
    state = {f"{name}.experts.{part}": value for name in model for part, value in stacked.items()}
    expected = {name for name in model.state_dict() if ".experts." in name}
    assert by_expert(state, model).keys() == expected


def test_a_stacked_state_of_another_number_of_experts_is_refused():
    state = conv().state_dict()
    stacked = {"experts.weight": torch.zeros(4, 6, 8, 3, 3), "experts.bias": torch.zeros(4, 6)}
    with raises(RuntimeError, match=r"Missing key.*experts\.0\.weight"):
        conv().load_state_dict({key: state[key] for key in state if key.startswith("gate.")} | stacked)


def test_a_state_with_both_names_of_one_tensor_is_refused():
    with raises(RuntimeError, match=r"Unexpected key.*experts\.weight"):
        conv().load_state_dict(conv().state_dict() | {"experts.weight": torch.zeros(3, 6, 8, 3, 3)})


def test_a_state_of_another_number_of_experts_is_refused():
    with raises(RuntimeError, match=r"Missing key.*experts\.3\.weight"):
        FusedConvMoE.from_conv(nn.Conv2d(8, 6, 3), 4).load_state_dict(conv().state_dict())


# --- memory of the experts --------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The names of the operations inside that make or fill a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(part in func.__name__ for part in ("empty", "copy", "clone", "zeros")):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@mark.parametrize("name", LAYERS)
def test_experts_that_lie_together_are_neither_moved_nor_copied(name: str, layout: torch.memory_format):
    experts = LAYERS[name]().to(memory_format=layout).experts
    places = [tensor.data_ptr() for tensor in experts.state_dict().values()]
    state = experts.__getstate__()
    with Allocations() as moved:
        experts.__setstate__(dict(state))
    assert moved.names == []
    if layout == torch.contiguous_format:  # of other layouts `_apply` asks with a small tensor whether they are to stay
        with Allocations() as moved:
            experts.float()
        assert moved.names == []
    assert [tensor.data_ptr() for tensor in experts.float().state_dict().values()] == places
    with Allocations() as moved:
        experts.double()
    assert len(moved.names) > 0  # and where the numbers do change, they are counted


# --- copies -----------------------------------------------------------------------------------------------------------


def through_pickle(moe: MoELayer) -> MoELayer:
    return pickle.loads(pickle.dumps(moe))


def through_torch_save(moe: MoELayer) -> MoELayer:
    buffer = io.BytesIO()
    torch.save(moe, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save], ids=lambda f: f.__name__)
@mark.parametrize("name", LAYERS)
def test_copies_after_a_forward_with_gradients(name: str, copied):
    moe = trained(name, top_k=1, straight_through=False, renormalize=False, noise_std=0.25)
    moe.fixed_expert = 2
    record = moe.routing
    twin = copied(moe)
    assert moe.routing is record  # the original keeps its own
    assert twin.routing is None
    assert twin.extra_repr() == moe.extra_repr()
    assert twin.fixed_expert == 2
    assert twin.training
    moe.eval()
    twin.eval()
    for layer in (moe, twin):
        layer.fixed_expert = None
    assert torch.equal(twin(images()), moe(images()))
    assert torch.equal(twin.expert(1)(images()), moe.expert(1)(images()))
    before = {key: value.clone() for key, value in moe.state_dict().items()}
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.zero_()
    assert all(torch.equal(value, before[key]) for key, value in moe.state_dict().items())


def test_a_layer_that_an_earlier_version_pickled_has_no_record_yet():
    moe = conv()
    state = moe.__getstate__()
    state["routing"] = state.pop("_routing")  # its name then
    found = object.__new__(type(moe))
    found.__setstate__(state)
    assert found.routing is None
    assert torch.equal(found(images()), moe(images()))
    assert torch.equal(found.last_routing().scores, moe.last_routing().scores)
    assert found.__dict__.keys() == moe.__dict__.keys()


def test_a_copied_model_trains_on_its_own():
    model = nn.Sequential(trained("basic"), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(images()).square().sum().backward()
    mine, theirs = (each[0].experts[0].conv1.weight for each in (model, twin))
    assert theirs.grad.any()
    assert theirs.grad.data_ptr() != mine.grad.data_ptr()


# --- precision --------------------------------------------------------------------------------------------------------


def blocks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "basic": torchvision_resnet.BasicBlock(8, 8),
        "bottleneck": torchvision_resnet.Bottleneck(8, 3, 2, downsample(8, 12)),
        "excited": any_blocks.BLOCKS["squeeze and excitation"](),
        "preactivated": any_blocks.BLOCKS["pre-activation"](),
        "mlp": Mlp(6, 10),
    }


def routed(module: nn.Module) -> MoELayer:
    return FusedMLPMoE.from_mlp(module, 3) if isinstance(module, Mlp) else FusedBlockMoE.from_block(module, 3)


@mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@mark.parametrize("name", ["basic", "bottleneck", "excited", "preactivated", "mlp"])
def test_conversion_loses_no_more_than_the_block_does(name: str, dtype: torch.dtype):
    """Experts that are copies: whatever the route, the layer computes the block, up to the weighted sum.

    The sum runs in single precision at least over weights that add up to 1, and is rounded once: its error is at most
    the rows' own and half an eps; 2 eps leaves the weights' rounding in.
    """
    block = blocks()[name].to(dtype).eval()
    moe = routed(blocks()[name]).to(dtype).eval()
    x = images(dtype=dtype)
    truth = copy.deepcopy(block).double()(x.double())
    out = moe(x)
    assert out.dtype == dtype
    error = (out.double() - truth).abs().max().item()
    of_block = (block(x).double() - truth).abs().max().item()
    assert error <= 2 * of_block + 2 * torch.finfo(dtype).eps * truth.abs().max().item()


@mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
@mark.parametrize("name", ["basic", "preactivated", "mlp"])
def test_a_converted_layer_trains(name: str, convert):
    moe = convert(LAYERS[name]())
    dtype = next(moe.experts.parameters()).dtype
    moe(images(dtype=dtype)).float().square().mean().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name
    assert all(buffer.dtype == torch.int64 for n, buffer in moe.named_buffers() if n.endswith("num_batches_tracked"))


@mark.parametrize(("name", "gate"), [*((n, g) for n in OF_MAPS for g in ("gap_fc", "conv_gap")), ("mlp", "linear")])
def test_autocast_computes_experts_in_bfloat16_and_the_gate_in_single_precision(name: str, gate: str):
    """Same routes, so out = sum_j w_j e_j with weights that add up to 1: the layer is off by at most what its experts
    are off by. Twice that, measured on the whole batch: on their own segment convolutions may sum in another order,
    which rounds to bfloat16 the other way at worst. A layer that returns bfloat16 rounds once more, by eps/2."""
    torch.manual_seed(0)
    moe = LAYERS[name](gate=gate).eval()
    experts = [moe.expert(i) for i in range(3)]
    x = images()
    wanted, exact = moe(x), moe.routing
    of_experts = [expert(x) for expert in experts]
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = moe(x), moe.routing
        errors = [(expert(x) - y).abs().max().item() for expert, y in zip(experts, of_experts, strict=True)]
    assert routing.logits.dtype == torch.float32
    assert torch.equal(routing.logits, exact.logits)
    assert torch.equal(routing.indices, exact.indices)
    assert torch.equal(routing.weights, exact.weights)
    assert max(errors) > 0, "autocast must have reached the convolutions"
    rounding = torch.finfo(torch.bfloat16).eps / 2 * wanted.abs().max().item()
    # 1e-5: the single-precision sums themselves.
    assert (out.float() - wanted).abs().max().item() <= 2 * max(errors) + rounding + 1e-5


@mark.parametrize("name", ["basic", "mlp"])
def test_training_under_autocast_gives_single_precision_gradients(name: str):
    torch.manual_seed(0)
    moe = LAYERS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        loss = moe(images(8)).square().mean() + balance_loss(moe)
    loss.backward()
    assert balance_loss(moe).dtype == torch.float32
    for name, parameter in moe.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# --- memory format ----------------------------------------------------------------------------------------------------

# Double precision and other summation orders: a few hundred additions of numbers of magnitude 1 to 10.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def test_inputs_of_any_layout_give_the_same_values():
    torch.manual_seed(0)
    moe = basic().double().eval()
    wide = torch.randn(8, 8, 12, 6, dtype=torch.float64)
    layouts = {
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "every other row of a larger map": lambda x: wide[::2, :, ::2],
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "without a batch stride": lambda x: x[:1].expand(4, -1, -1, -1),
    }
    for name, layout in layouts.items():
        x = layout(wide[::2, :, ::2].contiguous()).detach().requires_grad_()
        dense = x.detach().contiguous().requires_grad_()
        assert (x.stride() != dense.stride()) or name == "channels last", name
        out, wanted = moe(x), moe(dense)
        torch.testing.assert_close(out, wanted, **CLOSE)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.square().sum(), leaf)[0] for y, leaf in ((out, x), (wanted, dense))), **CLOSE
        )


@mark.parametrize("name", OF_MAPS)
def test_channels_last_comes_out_where_it_goes_in(name: str):
    moe = trained(name).double().eval()
    x = images(dtype=torch.float64)
    out = moe(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, moe(x), **CLOSE)


@mark.parametrize("name", OF_MAPS)
def test_a_model_converts_to_channels_last_and_back(name: str):
    """Converted filters have their output channels innermost, the engine's own order; off the engine they have the
    libraries'. As built they are contiguous, as what flattens or saves parameters needs them. An extracted expert is an
    ordinary contiguous block."""
    moe = trained(name).double().eval()
    x = images(dtype=torch.float64)
    wanted = moe(x)
    state = {key: value.clone() for key, value in moe.state_dict().items()}
    assert all(p.is_contiguous() for p in moe.parameters())
    moe.to(memory_format=torch.channels_last)
    filters = [p for p in moe.experts.parameters() if p.dim() == 4]
    assert filters
    if moe.experts.together:
        assert all(p.permute(2, 3, 1, 0).is_contiguous() for p in filters)
    else:
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    assert all(torch.equal(value, state[key]) for key, value in moe.state_dict().items())
    torch.testing.assert_close(moe(x.contiguous(memory_format=torch.channels_last)), wanted, **CLOSE)
    expert = moe.expert(1)
    assert all(p.is_contiguous() for p in expert.parameters())
    moe.to(memory_format=torch.contiguous_format)
    assert all(p.is_contiguous() for p in moe.parameters())
    assert all(torch.equal(value, state[key]) for key, value in moe.state_dict().items())
