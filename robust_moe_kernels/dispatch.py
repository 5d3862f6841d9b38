"""Which implementation of an op runs.

Every op folder holds ``reference_impl.py``, ``native_impl.py`` and ``triton_impl.py``: modules with the same functions
and a ``why_not(device_type)`` that returns ``None`` when it can run there, else the reason in words. A module that
cannot compute all operands says so by ``why_not_case(*operands)``, in the same way. ``impl="auto"`` takes the first of
the op's order for the device that can compute the operands; any other ``impl`` is taken literally and never falls back.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from torch import Tensor

__all__ = ["AUTO", "IMPLEMENTATIONS", "ImplementationUnavailable", "Op"]

AUTO = "auto"
IMPLEMENTATIONS = ("reference", "native", "triton")


class ImplementationUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot run; the message says why."""


class Op:
    """One op's implementations and each device's order of preference.

    ``package`` is the op's package name; ``cpu`` and ``cuda`` name implementations, most wanted first. Any other device
    type runs the reference.
    """

    def __init__(self, package: str, *, cpu: tuple[str, ...], cuda: tuple[str, ...]) -> None:
        self.package = package
        self.name = package.rsplit(".", 1)[-1]
        self._order = {"cpu": cpu, "cuda": cuda}

    def __repr__(self) -> str:
        return f"Op({self.name!r})"

    def order(self, device_type: str) -> tuple[str, ...]:
        """Implementations that ``auto`` considers on a device, most wanted first."""
        return self._order.get(device_type, ("reference",))

    @cache  # noqa: B019  # ops live as long as the process
    def module(self, impl: str) -> ModuleType:
        """An implementation's module, whether or not it can run here; raises ``ImportError`` without its libraries."""
        return importlib.import_module(f"{self.package}.{impl}_impl")

    @cache  # noqa: B019
    def why_not(self, impl: str, device_type: str) -> str | None:
        """``None`` when ``impl`` can run on ``device_type``, else the reason."""
        if impl not in IMPLEMENTATIONS:
            return f"no such implementation; expected one of {', '.join(IMPLEMENTATIONS)}"
        try:
            module = self.module(impl)
        except ImportError as error:
            return f"cannot be imported: {error}"
        return module.why_not(device_type)

    def choose(self, impl: str, *operands: Tensor | None) -> ModuleType:
        """The module that computes these operands, which lie on the device of the first that is not ``None``.

        Raises:
            ImplementationUnavailable: the named implementation cannot, or with "auto" none of the op's order can.
        """
        tensors = [tensor for tensor in operands if tensor is not None]
        device_type = tensors[0].device.type
        reasons = []
        for name in self.order(device_type) if impl == AUTO else (impl,):
            reason = self.why_not(name, device_type)
            if reason is None:
                module = self.module(name)
                why_not_case = getattr(module, "why_not_case", None)
                reason = None if why_not_case is None else why_not_case(*tensors)
                if reason is None:
                    return module
            reasons.append(reason)
        raise ImplementationUnavailable(f"{self.name}: impl={impl!r} cannot run on {device_type}: {'; '.join(reasons)}")
