"""Residual networks for small images, with experts in the places that a configuration names; mixtures of whole
networks; dual models.

A network is one line in :data:`MODELS`, a router one in :data:`ROUTERS`.
"""

from __future__ import annotations

from .build import MODELS, build_model
from .dual import DualModel
from .mixing import log_mixture
from .mixture import ExpertMixture, NetworkExperts
from .normalize import Normalize
from .resnet import BasicBlock, Bottleneck, ResNet
from .routers import ROUTERS, Router

__all__ = [
    "MODELS",
    "ROUTERS",
    "BasicBlock",
    "Bottleneck",
    "DualModel",
    "ExpertMixture",
    "NetworkExperts",
    "Normalize",
    "ResNet",
    "Router",
    "build_model",
    "log_mixture",
]
