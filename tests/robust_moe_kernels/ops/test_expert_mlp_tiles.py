"""Every tile of the routed MLP's Triton kernels, and the rule that chooses among them."""

from __future__ import annotations

import pytest
import torch
from mlp_cases import Case, inputs_of, oracle, route_of, run

from robust_moe_kernels.ops.expert_conv.tiles import Gpu
from robust_moe_kernels.ops.expert_mlp import expert_mlp
from robust_moe_kernels.ops.expert_mlp.tiles import CHOICES, ELEMENT, Choice, choose

triton_impl = pytest.importorskip("robust_moe_kernels.ops.expert_mlp.triton_impl")
triton_launch = pytest.importorskip("robust_moe_kernels.ops.expert_mlp.triton_launch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H100 = Gpu(90, 227 * 1024, 132, True)
A100 = Gpu(80, 163 * 1024, 108, True)
# 80 rows of the first expert, a whole tile of 64 and a partial one, and none of the second.
EVEN = Case("even", 80, 1, 2, (64, 128, 64), "gelu", "widths of whole blocks: descriptors, no masks", used=1)
ODD = Case("odd", 80, 1, 2, (50, 72, 33), "gelu", "widths that divide nothing: masks", used=1)
TILES = [
    (kernel, kind, choice, activation)
    for kernel, kinds in CHOICES.items()
    for kind, choices in kinds.items()
    for choice in choices
    for activation in ("gelu", "glu_silu")
    # tf32 is another instruction, which no interpreter has; "rows" and "matrix" know nothing of activations
    if kind != "tf32" and (activation == "gelu" or kernel.startswith("hidden"))
]


def label(value: object) -> str | None:
    return "x".join(map(str, value.tile)) if isinstance(value, Choice) else None


@pytest.mark.parametrize(("kernel", "kind", "choice", "activation"), TILES, ids=label)
def test_every_tile(kernel, kind, choice, activation, generator, monkeypatch):
    """One kernel by the tile, the others by the last that fits: within twice the error of PyTorch's layers."""
    case = (ODD if kind == "narrow" else EVEN)._replace(activation=activation)
    inputs = inputs_of(case, generator, torch.float32 if kind == "ieee" else torch.float16)
    chosen = []

    def instead(name, *arguments):
        chosen.append(name)
        return choice if name == kernel else choose(name, *arguments)

    for module in (triton_impl, triton_launch):
        monkeypatch.setattr(module, "choose", instead)
    got = run(inputs.to(DEVICE), case, "triton")
    assert kernel in chosen
    truth, plain = oracle(inputs, case), oracle(inputs, case, inputs.x.dtype)
    for name, right in truth.items():
        error, allowed = ((t[name].cpu().double() - right).abs().max() for t in (got, plain))
        assert error <= 2 * allowed + 2 * torch.finfo(inputs.x.dtype).eps * right.abs().max(), name


def test_shares_of_a_weight_gradient_add_up(generator, monkeypatch):
    """Few tiles over many rows: on 132 multiprocessors the rows of each expert are two shares."""
    case = Case("shares", 600, 1, 2, (16, 16, 16), "relu", "300 rows an expert: two shares of 8 blocks of 16")
    inputs = inputs_of(case, generator)
    monkeypatch.setattr(triton_impl, "gpu_of", lambda device: H100)
    got = run(inputs.to(DEVICE), case, "triton")
    truth, plain = oracle(inputs, case), oracle(inputs, case, torch.float32)
    for name in ("d_weight1", "d_weight2"):
        error, allowed = ((t[name].cpu().double() - truth[name]).abs().max() for t in (got, plain))
        assert error <= 2 * allowed + 2e-7 * truth[name].abs().max(), name


@pytest.mark.parametrize(("wanted", "kernels"), [
    (("x", "weights"), {"hidden_backward", "rows"}),
    (("weights",), {"hidden_backward"}),
    (("weight2",), {"hidden_backward", "matrix"}),
    (("bias2",), set()),
])  # fmt: skip
def test_no_product_that_is_not_asked_for(wanted, kernels, generator, monkeypatch):
    """An attack asks for the gradients of tokens and weights: no weight gradient is computed."""
    names = ("x", "weight1", "bias1", "weight2", "bias2", "weights")
    case = Case("asked", 9, 2, 3, (16, 32, 16), "gelu", "two gradients of six")
    inputs = inputs_of(case, generator).to(DEVICE)
    leaves = {name: t.requires_grad_(name in wanted) for name, t in zip(names, inputs[:6], strict=True)}
    x, *layers, weights = leaves.values()
    y = expert_mlp(x, *layers, route_of(inputs.indices, case.experts), weights, case.activation, None, "triton")
    chosen = []
    for module in (triton_impl, triton_launch):
        monkeypatch.setattr(module, "choose", lambda *arguments: chosen.append(arguments[0]) or choose(*arguments))
    torch.autograd.grad(y, [leaves[name] for name in wanted], inputs.d_y)
    assert set(chosen) == kernels


def test_tiles_fit_the_shared_memory():
    """The last of every kind on an A100 and, in float32, on any GPU; all of them on an H100."""
    for kinds in CHOICES.values():
        for kind, choices in kinds.items():
            assert all(choice.tile.shared(ELEMENT[kind]) <= H100.shared for choice in choices)
            assert choices[-1].tile.shared(ELEMENT[kind]) <= 99 * 1024


@pytest.mark.parametrize(("kernel", "rows", "columns", "depth", "gpu", "tile"), [
    ("rows", 12608, 384, 1536, H100, (128, 128)),  # ViT-S: 256 columns a tile would compute a third more
    ("rows", 12608, 512, 2048, H100, (128, 256)),
    ("rows", 5793, 512, 512, H100, (128, 256)),  # the case that was measured, of the convolution
    ("rows", 2896, 512, 512, H100, (128, 128)),  # the same
    ("rows", 700, 384, 1536, H100, (64, 64)),
    ("rows", 12608, 512, 2048, A100, (128, 128)),  # 192 KiB for the larger
    ("hidden", 12608, 1536, 384, H100, (128, 128)),  # few channels summed: the epilogue weighs more
    ("hidden", 12608, 4096, 1024, H100, (128, 256)),
    ("hidden", 2, 16, 16, H100, (64, 64)),
    ("hidden_backward", 12608, 1536, 384, H100, (64, 128)),
])  # fmt: skip
def test_choice(kernel, rows, columns, depth, gpu, tile):
    assert choose(kernel, "half", rows, columns, depth, gpu).tile[:2] == tile


def test_no_tile_fits():
    with pytest.raises(ValueError, match=r"^tile: expected a GPU with more shared memory for one, got 1024 bytes$"):
        choose("rows", "half", 10, 10, 10, Gpu(75, 1024, 2, False))
