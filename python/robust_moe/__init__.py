"""Adversarial training and evaluation of mixture-of-experts vision models.

:func:`train`, :func:`load_model`, :func:`evaluate`, :func:`list_presets`, and for others' use :func:`save_pretrained`,
:func:`from_pretrained` and :func:`export_model`, are here; PyTorch is imported when one of them is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from robust_moe.lazy import lazily

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

__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("evaluate", "list_presets", "load_model", "train"), "api"),
        **dict.fromkeys(("export_model", "from_pretrained", "save_pretrained"), "pretrained"),
    },
)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
