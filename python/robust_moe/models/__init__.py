"""Networks for small images, with experts in the places that a configuration names; mixtures of whole networks; dual
models.

Models, gates, routers, routings in evaluation and balance losses are entries of the tables :data:`MODELS`,
:data:`GATES`, :data:`ROUTERS`, :data:`INFERENCE_ROUTINGS` and :data:`BALANCE_LOSSES`; one from outside is a class or a
function with settings of its own, registered there.
"""

from __future__ import annotations

from .balance import BALANCE_LOSSES, BalanceConfig, BalanceLoss
from .build import build_model
from .config import MODELS, DualConfig, MixtureConfig, ModelConfig, MoEConfig, NetworkConfig
from .dual import DualModel
from .gates import GATES, GateConfig, LinearGateConfig, TokenGateConfig
from .images import ImageSpec
from .inference import INFERENCE_ROUTINGS, InferenceConfig, MarginSoft, RandomTop
from .libraries import LibraryConfig
from .mixing import log_mixture
from .mixture import ExpertMixture, NetworkExperts
from .normalize import Normalize
from .preact import PreActResNet, PreActResNet18Config, WideResNet, WideResNetConfig
from .resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    ResNet18Config,
    ResNet50Config,
    ResNetConfig,
    ResNetSmallConfig,
)
from .routers import ROUTERS, Router, RouterConfig
from .vit import ViTConfig, ViTMicroConfig, ViTSmallConfig, ViTTinyConfig

__all__ = [
    "BALANCE_LOSSES",
    "GATES",
    "INFERENCE_ROUTINGS",
    "MODELS",
    "ROUTERS",
    "BalanceConfig",
    "BalanceLoss",
    "BasicBlock",
    "Bottleneck",
    "DualConfig",
    "DualModel",
    "ExpertMixture",
    "GateConfig",
    "ImageSpec",
    "InferenceConfig",
    "LibraryConfig",
    "LinearGateConfig",
    "MarginSoft",
    "MixtureConfig",
    "MoEConfig",
    "ModelConfig",
    "NetworkConfig",
    "NetworkExperts",
    "Normalize",
    "PreActResNet",
    "PreActResNet18Config",
    "RandomTop",
    "ResNet",
    "ResNet18Config",
    "ResNet50Config",
    "ResNetConfig",
    "ResNetSmallConfig",
    "Router",
    "RouterConfig",
    "TokenGateConfig",
    "ViTConfig",
    "ViTMicroConfig",
    "ViTSmallConfig",
    "ViTTinyConfig",
    "WideResNet",
    "WideResNetConfig",
    "build_model",
    "log_mixture",
]
