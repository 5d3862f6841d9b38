"""Adversarial training and evaluation of mixture-of-experts vision models.

:func:`train`, :func:`load_model`, :func:`evaluate`, :func:`list_presets`, and for others' use :func:`save_pretrained`,
:func:`from_pretrained` and :func:`export_model`, are here; PyTorch is imported when one of them is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_moe.api import evaluate, list_presets, load_model, train
    from robust_moe.pretrained import export_model, from_pretrained, save_pretrained

__all__ = [
    "evaluate",
    "export_model",
    "from_pretrained",
    "list_presets",
    "load_model",
    "save_pretrained",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from robust_moe import api, pretrained

    return getattr(api if name in api.__all__ else pretrained, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
