"""Vision transformers: timm's, with the patch that the images' size asks for.

A. Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", arXiv:2010.11929;
ViT-Ti and ViT-S are those of Touvron et al., arXiv:2012.12877. timm is imported when the first one is built.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from robust_moe.models.config import MODELS, ModelConfig, MoEConfig
from robust_moe.models.gates import LinearGateConfig
from robust_moe.models.images import ImageSpec
from robust_moe.settings import ConfigError, setting

__all__ = ["ViTConfig", "ViTMicroConfig", "ViTSmallConfig", "ViTTinyConfig"]

WIDTH = "channels of a token"
DEPTH = "transformer blocks, blocks.0 and so on"
HEADS = "attention heads; they divide the width"
WIDEST, DEEPEST = 2**14, 256  # channels of a token, blocks
PATCHES = ((32, 4), (64, 8))  # (largest image, its patch), in pixels: 64 tokens and the class token
LARGE_PATCH = 16  # of larger images; at 224 pixels 196 tokens and the class token


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """A vision transformer that classifies by its class token; images are normalised in front of it.

    ``moe.layers`` are MLPs, such as ``blocks.9.mlp``; each token has a route of its own. V-MoE (Riquelme et al.,
    arXiv:2106.05974) replaces the MLPs of every second block, ``blocks.1.mlp``, ``blocks.3.mlp``, ...: all of them
    ("Every 2"), or of these the last n ("Last n").
    """

    width: int = setting(192, WIDTH, at_least=1, at_most=WIDEST)
    depth: int = setting(12, DEPTH, at_least=1, at_most=DEEPEST)
    heads: int = setting(3, HEADS, at_least=1, at_most=WIDEST)
    mlp_ratio: float = setting(4.0, "hidden channels of an MLP, in units of the width", above=0, at_most=64)
    patch_size: int | None = setting(
        None,
        "side of the square that becomes a token; null: 4 in images of up to 32 pixels, 8 up to 64, 16 beyond",
        unit="pixels",
        at_least=1,
        at_most=2**12,
    )
    moe: MoEConfig = setting(MoEConfig(gate=LinearGateConfig()), "experts inside the network")

    def check(self) -> None:
        super().check()
        if self.width % self.heads:
            raise ConfigError(f"heads: expected a divisor of the width {self.width}, got {self.heads}")
        if int(self.width * self.mlp_ratio) < 1:
            raise ConfigError(
                f"mlp_ratio: expected at least one hidden channel of {self.width} * mlp_ratio, got {self.mlp_ratio:g}"
            )

    def check_images(self, images: ImageSpec, alone: bool) -> None:
        patch = _patch(images.image_size, self.patch_size)
        if images.image_size < 1 or images.image_size % patch:
            raise ValueError(
                f"image_size: expected a multiple of {patch} pixels, the side of a patch (model.patch_size), got "
                f"{images.image_size}"
            )


def _patch(image_size: int, patch_size: int | None) -> int:
    """Pixels a side of a patch; None: what the size of the images asks for."""
    if patch_size is not None:
        return patch_size
    return next((patch for largest, patch in PATCHES if image_size <= largest), LARGE_PATCH)


@dataclass(frozen=True, kw_only=True)
class ViTTinyConfig(ViTConfig):
    """ViT-Ti: 5.4 M parameters on images of 32 pixels with ten classes, 5.7 M on those of ImageNet."""


@dataclass(frozen=True, kw_only=True)
class ViTSmallConfig(ViTConfig):
    """ViT-S: 21.3 M parameters on images of 32 pixels with ten classes, 22.1 M on those of ImageNet."""

    width: int = setting(384, WIDTH, at_least=1, at_most=WIDEST)
    heads: int = setting(6, HEADS, at_least=1, at_most=WIDEST)


@dataclass(frozen=True, kw_only=True)
class ViTMicroConfig(ViTConfig):
    """0.68 M parameters, for studies on a CPU: half of ViT-Ti's width and depth."""

    width: int = setting(96, WIDTH, at_least=1, at_most=WIDEST)
    depth: int = setting(6, DEPTH, at_least=1, at_most=DEEPEST)


@MODELS.register("vit_micro", ViTMicroConfig)
@MODELS.register("vit_tiny", ViTTinyConfig)
@MODELS.register("vit_small", ViTSmallConfig)
def vision_transformer(
    images: ImageSpec, width: int, depth: int, heads: int, mlp_ratio: float, patch_size: int | None
) -> nn.Module:
    """timm's ``VisionTransformer`` with learned positions and GELU, for images that are normalised already.

    Raises ValueError where timm cannot be imported; beside a PyTorch build that is not its own torchvision, which timm
    imports, raises RuntimeError.
    """
    try:
        module: Any = importlib.import_module("timm.models.vision_transformer")
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"model.name: expected timm to import (pip install 'robust-moe-kernels[train]') for a vision transformer, "
            f"got: {error}"
        ) from error
    return module.VisionTransformer(
        img_size=images.image_size,
        patch_size=_patch(images.image_size, patch_size),
        in_chans=images.channels,
        num_classes=images.num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
    )
