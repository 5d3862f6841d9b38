"""Adversarial training and evaluation of mixture-of-experts vision models.

:func:`train`, :func:`load_model`, :func:`evaluate` and :func:`list_presets` are here; PyTorch is imported when one of
them is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_moe.api import evaluate, list_presets, load_model, train

__all__ = ["evaluate", "list_presets", "load_model", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from robust_moe import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
