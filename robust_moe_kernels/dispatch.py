"""Which implementation of an op runs.

Every op folder holds ``reference_impl.py``, ``native_impl.py`` and ``triton_impl.py``: modules with the same functions
and a ``why_not(device_type)`` that returns ``None`` when it can run there, else the reason in words. ``impl="auto"``
takes the first runnable one in the op's order for the device; any other ``impl`` is taken literally and never falls
back.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

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
    def why_not(self, impl: str, device_type: str) -> str | None:
        """``None`` when ``impl`` can run on ``device_type``, else the reason."""
        if impl not in IMPLEMENTATIONS:
            return f"no such implementation; expected one of {', '.join(IMPLEMENTATIONS)}"
        try:
            module = importlib.import_module(f"{self.package}.{impl}_impl")
        except ImportError as error:
            return f"cannot be imported: {error}"
        return module.why_not(device_type)

    @cache  # noqa: B019
    def choose(self, impl: str, device_type: str) -> ModuleType:
        """The module to run. Raises :class:`ImplementationUnavailable` when a named one cannot."""
        if impl == AUTO:
            impl = next(name for name in self.order(device_type) if self.why_not(name, device_type) is None)
        else:
            reason = self.why_not(impl, device_type)
            if reason is not None:
                raise ImplementationUnavailable(f"{self.name}: impl={impl!r} cannot run on {device_type}: {reason}")
        return importlib.import_module(f"{self.package}.{impl}_impl")
