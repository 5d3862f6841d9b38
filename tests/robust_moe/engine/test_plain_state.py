"""Weights from elsewhere start a model here: the same function, under whichever names they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from released_networks import ReleasedDual, ReleasedMixture, ReleasedResNet, RoutedFilters, unsettled
from safetensors.torch import save_file
from torch import Tensor, nn

from robust_moe.config import ConfigError, load_config
from robust_moe.engine import CheckpointError
from robust_moe.engine.experiment import make_model
from robust_moe.engine.plain_state import fitted, is_plain, read_plain_state, read_tensors
from robust_moe_kernels.modules import moe_layers

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SIZE = 8
DATA = {"name": "some", "class_names": list("0123456789"), "channels": 3, "image_size": SIZE, "mean": MEAN, "std": STD}
SMALL = ("model.name=resnet18", "model.width=4", "model.blocks=[2,2]")


def normalized(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)


def started(file: Path, *settings: str, size: int = SIZE) -> nn.Module:
    config = load_config(None, [f"model.init_from={file}", *settings])
    return make_model(config, DATA | {"image_size": size}).double().eval()


def images(size: int = SIZE) -> Tensor:
    return torch.rand(6, 3, size, size, dtype=torch.float64)


def expect_same(model: nn.Module, theirs: nn.Module, size: int = SIZE) -> None:
    x = images(size)
    torch.testing.assert_close(model(x), theirs(normalized(x)), rtol=1e-6, atol=1e-6)  # the file has float32


def save(model: nn.Module, path: Path, **around: Any) -> Path:
    state = {name: value.float() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    torch.save(around | {"state_dict": state} if around else state, path)
    return path


# --- files and prefixes


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_s_own_state_dict_starts_its_network_behind_a_normalisation(tmp_path: Path, library: str):
    make = torchvision.models.resnet18 if library == "torchvision" else timm.create_model
    theirs = unsettled(make(num_classes=10) if library == "torchvision" else make("resnet18", num_classes=10))
    expect_same(started(save(theirs, tmp_path / "w.pth"), f"model.name={library}:resnet18", size=32), theirs, 32)


def wrapped(state: dict[str, Tensor], kind: str) -> Any:
    if kind == "data parallel":
        return {"net": {f"module.{name}": value for name, value in state.items()}, "acc": 91.5, "epoch": 3}
    if kind == "compiled":
        return {"model_state_dict": {f"_orig_mod.module.{name}": value for name, value in state.items()}}
    if kind == "averaged":
        return {"n_averaged": torch.tensor(5), **{f"module.{name}": value for name, value in state.items()}}
    return {"state_dict": {f"model.{name}": value for name, value in state.items()}, "hyper_parameters": {}}


@pytest.mark.parametrize("kind", ["data parallel", "compiled", "averaged", "lightning"])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, kind: str):
    theirs = unsettled(ReleasedResNet())
    torch.save(wrapped(theirs.float().state_dict(), kind), tmp_path / "w.pt")
    expect_same(started(tmp_path / "w.pt", *SMALL), theirs.double())


def test_safetensors_and_files_from_before_archives_are_read(tmp_path: Path):
    theirs = unsettled(ReleasedResNet())
    state = theirs.float().state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.t7", _use_new_zipfile_serialization=False)
    theirs.double()
    for name in ("w.safetensors", "w.t7"):
        assert is_plain(tmp_path / name)
        expect_same(started(tmp_path / name, *SMALL), theirs)


def test_a_normalisation_in_the_file_is_the_model_s(tmp_path: Path):
    theirs = unsettled(ReleasedResNet())
    state = theirs.float().state_dict() | {
        "normalize.mean": torch.tensor([0.1, 0.2, 0.3]),
        "normalize.std": torch.ones(3),
    }
    torch.save(state, tmp_path / "w.pt")
    model = started(tmp_path / "w.pt", *SMALL)
    x = images()
    expected = theirs.double()(x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


# --- the two papers' codes


def mixture(name: str = "net", experts: int = 3) -> ReleasedMixture:
    networks: list[nn.Module] = [ReleasedResNet() for _ in range(experts)]
    if name == "vit":
        kind = timm.models.vision_transformer.VisionTransformer
        small = {"img_size": SIZE, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 10}
        networks = [kind(**small) for _ in range(experts)]
    return ReleasedMixture(networks, SIZE, name)


HARD = ("model.mixture.num_experts=3", "model.mixture.router=linear", "model.mixture.routing=hard")
VIT = ("model.name=vit_micro", "model.width=8", "model.depth=2", "model.heads=2")


@pytest.mark.parametrize(("name", "network"), [("net", SMALL), ("vit", VIT)])
def test_a_released_mixture_of_networks_is_the_same_function(tmp_path: Path, name: str, network: tuple[str, ...]):
    torch.manual_seed(0)
    theirs = unsettled(mixture(name))
    file = save(theirs, tmp_path / "w.t7", epoch=1)
    expect_same(started(file, *network, *HARD), theirs)


def test_a_released_dual_model_is_the_same_function(tmp_path: Path):
    torch.manual_seed(1)
    theirs = unsettled(ReleasedDual(mixture(), mixture(), 0.7))
    file = save(theirs, tmp_path / "w.t7")
    dual = ("model.dual.enabled=true", "model.dual.experts=true", "model.dual.mix=logits")
    model = started(file, *SMALL, *HARD, *dual, f"model.dual.standard.init_from={file}")
    expect_same(model, theirs)


def test_one_half_of_a_released_dual_model_may_start_alone(tmp_path: Path):
    theirs = unsettled(ReleasedDual(mixture(), mixture(), 0.7))
    file = save(theirs, tmp_path / "w.t7")
    expect_same(started(file, *SMALL, *HARD, "model.dual.enabled=true").robust, theirs.Rmoe)


ROUTED = [f"layer{stage}.{block}.conv{conv}" for stage in (1, 2) for block in (0, 1) for conv in (1, 2)]
CONVOLUTIONS = (f"model.moe.layers={','.join(ROUTED)}", "model.moe.num_experts=2", "model.moe.top_k=1")


def advmoe(path: Path, theirs: nn.Module) -> Path:
    """As the release saves it: the one router stands in the model, in each layer, and beside the state dict."""
    router = {f"router.{name}": torch.rand(3) for name in ("conv1.weight", "fc.weight", "fc.bias")}
    layers = {f"{layer}.{name}": value for layer in ROUTED for name, value in router.items()}
    state = theirs.float().state_dict() | router | layers
    torch.save({"epoch": 1, "arch": "resnet18_cifar_moe", "state_dict": state, "router": router, "best_acc": 0.5}, path)
    theirs.double()
    return path


def test_each_expert_of_released_routed_convolutions_is_the_same_function(tmp_path: Path):
    theirs = unsettled(ReleasedResNet(experts=2))
    with pytest.warns(UserWarning, match=r"init_from: .*left out 27 tensors of a router on the image, router\.conv1"):
        model = started(advmoe(tmp_path / "w.pth.tar", theirs), *SMALL, *CONVOLUTIONS)
    for expert in (0, 1):
        for module in theirs.modules():
            if isinstance(module, RoutedFilters):
                module.expert = expert
        for layer in moe_layers(model).values():
            layer.fixed_expert = expert
        expect_same(model, theirs)


def test_a_dense_state_starts_the_experts_of_a_routed_model(tmp_path: Path):
    theirs = unsettled(ReleasedResNet())
    file = save(theirs, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"init_from: expected a model with experts, got a dense one .*init=copy"):
        started(file, *SMALL, *CONVOLUTIONS)
    expect_same(started(file, *SMALL, *CONVOLUTIONS, "model.moe.init=copy"), theirs)


# --- what does not fit


def test_what_is_missing_left_over_and_of_other_shapes_is_said(tmp_path: Path):
    file = save(ReleasedResNet(width=4, classes=7), tmp_path / "w.pt")
    settings = ("model.name=resnet18", "model.width=4", "model.blocks=[2,3]")
    said = (
        r"model\.init_from: .*w\.pt: weights of another model: missing 10 of 76: layer2\.2\.conv1\.weight, .* 7 more; "
        r"of other shapes 2 of 76: fc\.weight \[7, 8\] for \[10, 8\], fc\.bias \[7\] for \[10\]$"
    )
    with pytest.raises(CheckpointError, match=said):
        started(file, *settings)
    with pytest.raises(
        CheckpointError, match=r"w\.pt: weights of another model: left over 12 of 52: layer2\.1\.conv1\.weight, "
    ):
        started(file, "model.name=resnet18", "model.width=4", "model.blocks=[2,1]")


def test_the_last_layer_of_another_number_of_classes_is_drawn_where_that_is_asked_for(tmp_path: Path):
    file = save(unsettled(ReleasedResNet(width=4, classes=7)), tmp_path / "w.pt")
    advice = r"of other shapes 2 of \d+: fc\.weight .*; model\.init_head=fresh starts the last layer anew$"
    with pytest.raises(CheckpointError, match=advice):
        started(file, *SMALL)
    state, theirs = started(file, *SMALL, "model.init_head=fresh").state_dict(), torch.load(file)
    assert state["fc.weight"].shape == (10, 8)
    torch.testing.assert_close(state["layer1.0.conv1.weight"].float(), theirs["layer1.0.conv1.weight"])
    with pytest.raises(CheckpointError, match=r"of other shapes \d+ of \d+: conv1\.weight"):  # more than the last layer
        started(file, "model.name=resnet18", "model.width=8", "model.blocks=[2,2]", "model.init_head=fresh")


REFUSED: dict[str, Any] = {
    r"expected tensors by name, or those under one of state_dict, .*, got a dict of 'epoch', 'args'$": {
        "epoch": 3,
        "args": {},
    },
    r"expected tensors by name, .*, got nothing$": {},
    r"got a file that is refused \(it holds a torchvision\.models\.resnet\.ResNet\)$": torchvision.models.resnet18,
    r"state dict\.w: expected a dense tensor, got a float32 tensor .*sparse": {"w": torch.eye(3).to_sparse()},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_state_dict_is_one_sentence(tmp_path: Path, message: str):
    content = REFUSED[message]
    torch.save(content() if callable(content) else content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message):
        read_plain_state(tmp_path / "w.pt")


def test_missing_and_damaged_files_are_named(tmp_path: Path):
    file = save(ReleasedResNet(), tmp_path / "w.pt")
    file.write_bytes(file.read_bytes()[:-200])
    (tmp_path / "w.safetensors").write_bytes(b"12345678")
    for name, message in (
        ("w.pt", "refused|truncated"),
        ("w.safetensors", "expected a file of safetensors, got"),
        ("x", "nothing"),
    ):
        with pytest.raises(CheckpointError, match=rf"{name}: .*({message})"):
            read_plain_state(tmp_path / name)


def test_of_two_tensors_for_one_place_the_second_is_left_over(tmp_path: Path):
    """Whichever comes first in the file: neither takes the other's place in silence."""
    state = ReleasedResNet().state_dict()  # its last layer is "linear", ours "fc"
    both = state | {name.replace("linear", "fc"): value + 1 for name, value in state.items() if "linear" in name}
    for content in (both, dict(reversed(both.items()))):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"left over 2 of \d+: linear\.(weight|bias), linear\."):
            started(tmp_path / "w.pt", *SMALL)


@pytest.mark.parametrize("half", ["normalize.mean", "normalize.std"])
def test_half_a_normalisation_is_not_completed_by_the_images(tmp_path: Path, half: str):
    torch.save(ReleasedResNet().state_dict() | {half: torch.ones(3)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"weights of another model: missing 1 of \d+: normalize\.(mean|std)$"):
        started(tmp_path / "w.pt", *SMALL)


def test_other_state_dicts_in_the_file_are_named(tmp_path: Path):
    state = ReleasedResNet().state_dict()
    torch.save({"model_ema": state, "model": state, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "w.pt")
    note = f"{tmp_path / 'w.pt'}: the state dict under 'model'; passed over the tensors under 'model_ema'"
    assert read_plain_state(tmp_path / "w.pt").notes == (note,)


@pytest.mark.parametrize("prefix", ["net", "model"])
def test_a_model_whose_own_names_begin_with_a_prefix_takes_its_own_state(tmp_path: Path, prefix: str):
    theirs = nn.ModuleDict({prefix: nn.Linear(3, 2)})
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    found = fitted(read_plain_state(tmp_path / "w.pt"), nn.ModuleDict({prefix: nn.Linear(3, 2)}), "w.pt")
    assert found.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in found.items())


def test_the_tensors_of_a_model_saved_here_keep_their_names(tmp_path: Path):
    """Nothing in them is a prefix or a name of other code."""
    state = {"net.router.gate.weight": torch.ones(2), "net.linear.bias": torch.zeros(1)}
    torch.save(state, tmp_path / "model.pt")
    assert read_tensors(tmp_path / "model.pt").keys() == state.keys()
    assert read_plain_state(tmp_path / "model.pt").tensors.keys() != state.keys()
