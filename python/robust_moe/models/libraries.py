"""Networks of timm and torchvision by their own names: ``model.name=timm:resnet26``, ``torchvision:resnet18``.

What they are, where their weights come from and how they are trained at best, their libraries say. The images that they
get are normalised by the training images' own statistics, with pretrained weights too.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from robust_moe.models.config import MODELS, ModelConfig
from robust_moe.models.images import ImageSpec
from robust_moe.settings import ConfigError, setting

__all__ = ["LibraryConfig"]


@dataclass(frozen=True, kw_only=True)
class LibraryConfig(ModelConfig):
    """A network of a library, with the number of classes that the images have."""

    pretrained: bool = setting(
        False, "begin with the library's pretrained weights, which it fetches, but for the last layer"
    )


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision: beside a build of PyTorch that is not its own
        library = name.partition(".")[0]
        raise ConfigError(f"model.name: expected {library} to import (pip install {library}), got: {error}") from error


def _timm_names() -> list[str]:
    return list(_library("timm").list_models())


def _torchvision_names() -> list[str]:
    models = _library("torchvision.models")
    return list(models.list_models(module=models))


@MODELS.register_family("timm", LibraryConfig, _timm_names)
def timm_network(images: ImageSpec, member: str, pretrained: bool) -> nn.Module:
    """timm's ``create_model``. Networks whose weights are for one size of images are made for this one."""
    timm = _library("timm")
    arguments = {"num_classes": images.num_classes, "in_chans": images.channels, "pretrained": pretrained}
    try:
        network: nn.Module = timm.create_model(member, img_size=images.image_size, **arguments)
    except TypeError:  # a network that takes images of any size has no such argument
        network = timm.create_model(member, **arguments)
    return network


@MODELS.register_family("torchvision", LibraryConfig, _torchvision_names)
def torchvision_network(images: ImageSpec, member: str, pretrained: bool) -> nn.Module:
    """torchvision's ``get_model``, for three channels; of pretrained weights the last layer is replaced.

    Raises ValueError for images of other channels, and pretrained weights whose last layer cannot be found.
    """
    if images.channels != 3:
        raise ValueError(f"channels: expected 3 for a network of torchvision, got {images.channels}; timm takes others")
    models = _library("torchvision.models")
    if not pretrained:
        made: nn.Module = models.get_model(member, weights=None, num_classes=images.num_classes)
        return made
    network: nn.Module = models.get_model(member, weights="DEFAULT")
    name, last = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    network.set_submodule(name, nn.Linear(last.in_features, images.num_classes))
    return network
